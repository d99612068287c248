"""The flash kernels over all keys, or all up to the query's own; for few queries, those that split a long cache."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``; the last query stands at the last key."""
    if is_decoding(q, k, v):
        return decode(q, k, v, causal=causal)[0]
    own = Line(base=1) if causal else None
    return attend_ranges(q, [Range(k, v, high=own)], offset=k.shape[2] - q.shape[2])[0]
