"""FlexAttention whose groups are lines: the shift moves where a row's keys begin, and nothing is rolled.

B batch, H heads, T tokens, D head width, G tokens of a group; the lines are those of ``triton``.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.flex import Between
from ctxbench.implementations._shared.lines import Line
from ctxbench.implementations._shared.positions import Position

OWN = Line(base=1)  # one past the query's own key


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, wrap: bool, position: Position
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, result of that shape; ``group`` is even. The second half of the heads is shifted."""
    heads, T, half = q.shape[1], q.shape[2], group // 2
    plain = heads - heads // 2
    own, others = slice(plain), slice(plain, heads)
    scores = [flex.biased(position, 0, q, heads) for heads in (own, others)]
    mixed = flex.attend(q[:, own], k[:, own], v[:, own], [Between(Line(group, group), OWN)], score=scores[0])
    if plain == heads:
        return mixed
    seen = [Between(Line(group, group, shift=half, base=-half), OWN)]
    begin = -(-T // group) * group - half  # of the group that the circle closes
    if wrap and begin < T:
        # All of it before the first boundary, none of it from there on.
        seen.append(Between(Line(group, T - begin, shift=half, base=begin)))
    shifted = flex.attend(q[:, others], k[:, others], v[:, others], seen, score=scores[1])
    return torch.cat((mixed.transpose(1, 2), shifted.transpose(1, 2)), dim=2).transpose(1, 2)
