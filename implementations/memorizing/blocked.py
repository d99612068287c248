"""Local attention in blocks, and a lookup that never holds the scores of a whole segment.

``dense`` is fused attention without a mask: all of a segment's memory lies before it. ``topk`` scores a slab of queries
at a time, keeps the indices of the best keys alone, and gathers their pairs; the backward pass gathers them again.
X = B H, n queries, m pairs in memory, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.biased_window import attend_blocks

SLAB = 1 << 20  # scores at once: with float32 they stay in a last-level cache
ROWS = 128  # fewest queries of a slab, so that its product runs at full speed


def lookup(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, m, D]``, result ``[B, H, n, D]``; ``top_k`` keys a query, all for None."""
    if top_k is None or top_k >= k.shape[2]:
        return scaled_dot_product_attention(q, k, v, scale=1.0)
    mixed = _TopK.apply(*(a.flatten(0, 1) for a in (q, k, v)), top_k)
    return mixed.unflatten(0, q.shape[:2])


class _TopK(torch.autograd.Function):
    """``q: [X, n, D]``, ``k, v: [X, m, D]``; gradients for ``q`` alone: the memory is not differentiable."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int) -> torch.Tensor:
        out = torch.empty_like(q)
        chosen = torch.empty(*q.shape[:2], top_k, dtype=torch.int32, device=q.device)
        weights = q.new_empty(*q.shape[:2], top_k)
        for rows in _slabs(q, k):
            best, index = torch.topk(q[:, rows] @ k.transpose(1, 2), top_k, dim=2, sorted=False)
            weights[:, rows], chosen[:, rows] = best.softmax(dim=2), index
            out[:, rows] = _weighted(weights[:, rows], _picked(v, index))
        ctx.save_for_backward(k, v, chosen, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, v, chosen, weights = ctx.saved_tensors
        dq = torch.empty_like(grad)
        for rows in _slabs(grad, k):
            index, p = chosen[:, rows].long(), weights[:, rows]
            by_weight = (_picked(v, index) @ grad[:, rows].unsqueeze(3)).squeeze(3)
            ds = torch._softmax_backward_data(by_weight, p, 2, p.dtype)
            dq[:, rows] = _weighted(ds, _picked(k, index))
        return dq, None, None, None


def _slabs(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    """Ranges of queries whose scores stay within SLAB."""
    rows = max(ROWS, SLAB // (len(k) * k.shape[1]))
    return (slice(first, first + rows) for first in range(0, q.shape[1], rows))


def _picked(stream: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``stream: [X, m, D]`` at ``index: [X, n, K]``: ``[X, n, K, D]``."""
    batch = torch.arange(len(stream), device=stream.device)[:, None, None]
    return stream[batch, index]


def _weighted(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of ``rows: [X, n, K, D]`` by ``weights: [X, n, K]``: ``[X, n, D]``."""
    return (weights.unsqueeze(2) @ rows).squeeze(2)


OPERATORS = (attend_blocks, lookup)
