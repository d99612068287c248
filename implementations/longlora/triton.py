"""Fused attention whose groups are lines: the shift moves where a row's keys begin, and nothing is rolled or copied.

B batch, H heads, T tokens, D head width, G tokens of a group. A plain head sees from ``floor(p / G) G`` to its own
token, a shifted one from ``floor((p + G/2) / G) G - G/2``. The circle is a second range under the same softmax: the
last group, which only the first G/2 tokens see.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges

OWN = Line(base=1)  # one past the query's own key


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, wrap: bool, position: Position
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, result of that shape; ``group`` is even. The second half of the heads is shifted."""
    heads, T, half = q.shape[1], q.shape[2], group // 2
    plain = heads - heads // 2
    own, bias = slice(plain), position.compact()
    of_own, of_others = (None, None) if bias is None else (bias[:plain], bias[plain:])
    mixed = attend_ranges(q[:, own], [Range(k[:, own], v[:, own], Line(group, group), OWN, start=0)], bias=of_own)[0]
    if plain == heads:
        return mixed
    query, key, value = (x[:, plain:] for x in (q, k, v))
    ranges = [Range(key, value, Line(group, group, shift=half, base=-half), OWN, start=0)]
    begin = -(-T // group) * group - half  # of the group that the circle closes
    if wrap and begin < T:
        # All of it before the first boundary, none of it from there on.
        low = Line(group, T - begin, shift=half)
        ranges.append(Range(key[:, :, begin:], value[:, :, begin:], low, start=begin))
    shifted = attend_ranges(query, ranges, bias=of_others)[0]
    return torch.cat((mixed.transpose(1, 2), shifted.transpose(1, 2)), dim=2).transpose(1, 2)
