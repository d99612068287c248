"""All segments in one call of FlexAttention: the position term is one product, read by each score at its distance.

The term is ``[B, H, T, N]`` for the N distances of a segment and its memory, so that it grows with T alone. Memory rows
pass no gradient to a layer's input, which one call cannot express: forward only.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.lines import Line


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; as in the reference, where ``phase`` is 0."""
    H, S, M, known = layer.num_heads, layer.params.segment_len, layer.params.mem_len, past.shape[1]
    rows = torch.cat((past, x), dim=1) if known else x
    q, k, v = (split_heads(project(part), H) for project, part in ((layer.q, x), (layer.k, rows), (layer.v, rows)))
    last = (x.shape[1] - 1) // S * S  # begin of the last segment
    longest = max(min(max(last - S, 0) + known, M) + min(S, x.shape[1]), min(last + known, M) + x.shape[1] - last)
    r = layer.r(layer.table[:longest]).unflatten(1, (H, -1)).permute(1, 2, 0)  # [H, D, N]
    term = (q + layer.position_bias[:, None]) @ r * layer.head_dim**-0.5
    seen = [flex.Between(Line(S, S, shift=-known, base=known - M), Line(base=1))]
    return merge_heads(
        flex.attend(q + layer.content_bias[:, None], k, v, seen, offset=known, score=by_distance(term, known))
    )


def by_distance(term: torch.Tensor, offset: int) -> flex.Score:
    """``term: [B, H, T, N]`` at the distance from a key back to its query."""
    farthest = term.shape[3] - 1

    def score(value: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        return value + term[b, h, row, (row + offset - key).clamp(0, farthest)]

    return score
