"""The flash kernels over all keys or up to the query's own; for few queries and no bias, those that split a cache."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.positions import Position, RelativeTerm
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations._shared.relative_table import Stair


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``; the last query stands at the last key."""
    if isinstance(position, RelativeTerm):
        from ctxbench.implementations._shared import relative_fused  # Triton's alone, the rest is C++ on CPUs too

        T, S = q.shape[2], k.shape[2]
        nearest = 0 if causal else 1 - T
        stair = Stair(memory=S - T, past=S - T, causal=int(causal), nearest=nearest)
        r = position.keys(nearest, S - 1)
        return relative_fused.relative(q, position.content_bias, position.position_bias, k, v, r, stair)
    bias = None if position is None else position.compact()
    if bias is None and is_decoding(q, k, v):
        return decode(q, k, v, causal=causal)[0]
    everything = Range(k, v, high=Line(base=1) if causal else None, start=0)
    return attend_ranges(q, [everything], offset=k.shape[2] - q.shape[2], bias=bias)[0]
