"""The lookup of ``blocked`` with its selection in C++, which visits a slab's scores while the caches hold them.

What was retrieved is read for all heads at once, from the stream where projections left it. X = B H, n queries,
m pairs in memory, K retrieved, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from ctxbench.implementations._shared.biased_window import attend_blocks
from ctxbench.implementations._shared.largest import largest_
from ctxbench.implementations._shared.rows import rows_of
from ctxbench.implementations.memorizing.blocked import gradient, scored
from ctxbench.implementations.memorizing.layer import Operators
from ctxbench.implementations.memorizing.sizes import SLAB


def lookup(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, m, D]``, result ``[B, H, n, D]``; ``top_k`` keys a query, all for None."""
    if top_k is None or top_k >= k.shape[2]:
        return scaled_dot_product_attention(q, k, v, scale=1.0)
    mixed: torch.Tensor = _TopK.apply(q, k, v, top_k)
    return mixed


class _TopK(torch.autograd.Function):
    """Gradients for the queries alone: the memory is not differentiable."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int) -> torch.Tensor:
        scores, chosen = search(q.flatten(0, 1), k.flatten(0, 1), top_k)
        weights = scores.softmax(dim=2)
        del scores
        ctx.save_for_backward(k, v, chosen, weights)
        return weighted(weights, v, chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, v, chosen, weights = ctx.saved_tensors
        dq = gradient(grad.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), chosen, weights)
        return dq.unflatten(0, grad.shape[:2]), None, None, None


def search(q: torch.Tensor, k: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scores of ``q: [X, n, D]`` among ``k: [X, m, D]``, and the numbers of their keys: ``[X, n, K]`` both."""
    found = q.new_empty(*q.shape[:2], top_k)
    chosen = torch.empty_like(found, dtype=torch.int32)
    for scores, heads, rows in scored(q, k, k.shape[1], SLAB):
        largest_(scores.view(-1, k.shape[1]), *(a[heads, rows].view(-1, top_k) for a in (found, chosen)))
    return found, chosen


def weighted(weights: torch.Tensor, stream: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Sums of the rows of ``stream: [B, H, m, D]`` at ``chosen: [X, n, K]`` by ``weights``, as large.

    Result ``[B, H, n, D]``, stored token by token: heads of one token then read rows that lie side by side.
    """
    rows, (B, H) = rows_of(stream), stream.shape[:2]
    index, shares = (a.unflatten(0, (B, H)).transpose(1, 2).flatten(0, 2) for a in (rows.number.at(chosen), weights))
    mixed = embedding_bag(index, rows.table, mode="sum", per_sample_weights=shares)  # [B * n * H, D]
    return mixed.view(B, -1, H, mixed.shape[1]).transpose(1, 2)


OPERATORS = Operators(attend_blocks, lookup)
