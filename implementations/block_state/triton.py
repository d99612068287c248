"""Causal attention inside a block by our kernels, which align it at the last key: a continued block needs no mask."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """``q: [B, H, n, D]``, the last n of the rows of ``k, v: [B, H, S, D]``; result ``[B, H, n, D]``."""
    bias = position.compact()
    if bias is None and is_decoding(q, k, v):
        return decode(q, k, v)[0]
    rows = Range(k, v, high=Line(base=1), start=0)
    return attend_ranges(q, [rows], offset=k.shape[2] - q.shape[2], bias=bias)[0]
