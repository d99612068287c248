"""Kernels of our own: the window and lookups of everything by the flash kernels, lookups of the best by ``search``."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.ranges import Range, attend
from ctxbench.implementations.memorizing.layer import Operators
from ctxbench.implementations.memorizing.search import Search
from ctxbench.implementations.memorizing.windows import biased_window, everything, window


def lookup(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """One segment of queries against its memory ``k, v: [B, H, m, D]``, result ``[B, H, n, D]``."""
    m = k.shape[2]
    if top_k is None or top_k >= m:
        return attend(q, [Range(k, v)], scale=1.0)[0]
    found: torch.Tensor = Search.apply(q, k, v, top_k, m, q.shape[2], m, torch.is_grad_enabled())
    return found


def whole(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None, segment_len: int, memory_len: int
) -> torch.Tensor:
    """All segments in one launch: each one's memory is a range of the call's own keys that moves in steps."""
    k, v = k.detach(), v.detach()
    if top_k is None or top_k >= memory_len:
        return everything(q, k, v, segment_len, memory_len)
    found: torch.Tensor = Search.apply(q, k, v, top_k, 0, segment_len, memory_len, torch.is_grad_enabled())
    return found


OPERATORS = Operators(window, lookup, whole, biased_window)
