"""Local attention in blocks, and a lookup that never holds the scores of a whole segment.

``dense`` is fused attention without a mask: all of a segment's memory lies before it. ``topk`` scores a slab at a time,
some queries of one head, keeps the indices of the best keys alone, and sums their values as a weighted bag, which
copies none of them; the backward pass gathers them. X = B H, n queries, m pairs in memory, K retrieved, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from ctxbench.implementations._shared.biased_window import attend_blocks
from ctxbench.implementations._shared.selection import best
from ctxbench.implementations._shared.tournament import padded
from ctxbench.implementations.memorizing.layer import Operators
from ctxbench.implementations.memorizing.sizes import ROWS, SLAB


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
        X, n, _ = q.shape
        out = torch.empty_like(q)
        chosen = torch.empty(X, n, top_k, dtype=torch.int32, device=q.device)
        weights = q.new_empty(X, n, top_k)
        for scores, heads, rows in scored(q, k, padded(k.shape[1], top_k), SLAB):
            values, index = best(scores.flatten(0, 1), top_k)
            chosen[heads, rows] = index.view(*scores.shape[:2], top_k)
            weights[heads, rows] = values.softmax(dim=1).view(*scores.shape[:2], top_k)
        for head, place in enumerate(out):
            place.copy_(_weighted(weights[head], v[head], chosen[head]))
        ctx.save_for_backward(k, v, chosen, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradient(grad, *ctx.saved_tensors), None, None, None


def scored(
    q: torch.Tensor, k: torch.Tensor, width: int, most: int
) -> Iterator[tuple[torch.Tensor, slice, slice]]:  # fmt: skip
    """Scores of some heads and some queries at a time, ``[heads, rows, width]``, and which those are.

    All are made in one buffer of ``most`` scores, or of ROWS queries; columns from m on are minus infinity.
    """
    X, n, _ = q.shape
    m = k.shape[1]
    count, step = _slab(X, n, width, most)
    buffer = q.new_full((count, step, width), float("-inf")) if width > m else q.new_empty(count, step, width)
    for heads in _ranges(X, count):
        keys = [key.contiguous() for key in k[heads]]  # each slab of queries reads them again
        for rows in _ranges(n, step):
            queries = q[heads, rows]
            scores = buffer[: len(queries), : queries.shape[1]]
            _multiply(queries, keys, scores[:, :, :m])
            yield scores, heads, rows
        keys.clear()  # before others are copied


def _multiply(q: torch.Tensor, keys: list[torch.Tensor], out: torch.Tensor) -> None:
    """Scores of ``q: [heads, rows, D]``, head by head."""
    for queries, key, place in zip(q, keys, out, strict=True):
        torch.mm(queries, key.T, out=place)


def gradient(
    grad: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Of the queries, ``[X, n, D]``, from that of the result, and the pairs that were chosen and their weights."""
    dq = torch.empty_like(grad)
    for head, (index, p, above) in enumerate(zip(chosen, weights, grad, strict=True)):
        by_weight = torch.empty_like(p)
        for rows in _ranges(len(above), ROWS):
            values = v[head].index_select(0, index[rows].flatten()).unflatten(0, index[rows].shape)  # [rows, K, D]
            by_weight[rows] = (values @ above[rows].unsqueeze(2)).squeeze(2)
        ds = torch._softmax_backward_data(by_weight, p, 1, p.dtype)
        dq[head] = _weighted(ds, k[head], index)
    return dq


def _slab(X: int, n: int, width: int, most: int) -> tuple[int, int]:
    """How many of X and how many queries have so wide scores together."""
    rows = min(n, max(ROWS, most // width))
    return min(X, max(1, most // (rows * width))), rows


def _ranges(count: int, step: int) -> Iterator[slice]:
    """Parts of so many, ``step`` long but for the last one."""
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _weighted(weights: torch.Tensor, stream: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Sum of the rows of ``stream: [m, D]`` at ``index: [n, K]`` by ``weights: [n, K]``: ``[n, D]``."""
    return embedding_bag(index, stream, mode="sum", per_sample_weights=weights)


OPERATORS = Operators(attend_blocks, lookup)
