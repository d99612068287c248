"""Attention of a piece in one launch of our kernels, whichever rows there are: up to three ranges of keys.

Read tokens and ordinary ones are a range each, and so are write tokens where they see each other fully.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations.rmt.layer import Rows


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool, position: Position
) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]`` whose last n are the piece's own; ``[B, H, n, D]``."""
    bias = position.compact()
    if bias is None and is_decoding(q, k, v) and not (full and rows.writes):
        return decode(q, k, v)[0]
    return attend_ranges(q, _ranges(k, v, rows, full), offset=k.shape[2] - q.shape[2], bias=bias)[0]


def _ranges(k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool) -> list[Range]:
    """A row at position p is the p-th of its segment, and sees the keys up to its own."""
    K = k.shape[2]
    if not full:
        return [Range(k, v, high=Line(base=1), start=0)]
    reads, end = rows.reads, K - rows.writes
    parts = [Range(k[:, :, reads:end], v[:, :, reads:end], high=Line(base=1 - reads), start=reads)]
    if reads:  # all rows see all of them
        parts.insert(0, Range(k[:, :, :reads], v[:, :, :reads], start=0))
    if rows.writes:  # write tokens see all of them, others none: one step up where the first of them stands
        high = Line(step=K, stride=K, shift=-end, base=rows.writes)
        parts.append(Range(k[:, :, end:], v[:, :, end:], high=high, start=end))
    return parts
