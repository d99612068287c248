"""All windows of a sequence in one launch, and what reads or writes states by the same kernels without a bound."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges


def attend_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``q: [B, H, T, D]``, scaled, the last T of the rows of ``k, v: [B, H, S, D]``; ``bias: [H, W]`` is zero."""
    W, past = bias.shape[1], k.shape[2] - q.shape[2]
    if q.shape[2] == 1 and is_decoding(q, k, v):  # of several queries each has a window of its own
        nearest = slice(max(k.shape[2] - W, 0), None)
        return decode(q, k[:, :, nearest], v[:, :, nearest], scale=1.0)[0]
    window = Range(k, v, low=Line(base=1 - W), high=Line(base=1))
    return attend_ranges(q, [window], offset=past, scale=1.0)[0]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T) v``; the scale is in the queries. ``q: [B, H, n, D]``, result likewise."""
    if is_decoding(q, k, v):
        return decode(q, k, v, causal=False, scale=1.0)[0]
    return attend_ranges(q, [Range(k, v)], scale=1.0)[0]


OPERATORS = (attend_window, attend)
