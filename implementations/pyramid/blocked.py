"""Fused attention at every level, and a fusion that projects each level at its own resolution.

Reading is nested: the cell of level l that token i reads is the one its cell of level l - 1 reads, because
``floor(floor((i + 1) / p^(l-1)) / p) = floor((i + 1) / p^l)``. So the sum over levels runs from coarse to fine,
``z_l = x_l W_l + up(z_(l+1))``, and every repetition is by one factor p; no ``[B, T, d_1 + d_2 + ...]`` is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.pyramid.layer import Operators

SLAB = 128  # cells whose scores over the level below are alive together


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position, span: int
) -> torch.Tensor:
    """As in the reference; keeps no score matrix."""
    if isinstance(position, Bias):
        return attend_slabs(q, k, v, causal, position, span)
    N, S = q.shape[2], k.shape[2]
    if causal and 1 < N < S:  # is_causal aligns at the top left, a continued cache needs the bottom right
        visible = torch.ones(N, S, dtype=torch.bool, device=q.device).tril(S - N)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=causal and N > 1)


def attend_below(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, pool: int, causal: bool
) -> torch.Tensor:
    """As in the reference; no more than SLAB rows of scores at a time."""
    if not causal:
        return scaled_dot_product_attention(q, k, v)
    return _Below.apply(q, k, v, start, pool)


class _Below(torch.autograd.Function):
    """Slabs of causal cells against the run of finer cells that any of them sees; probabilities are computed twice."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, pool: int) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.start, ctx.pool = start, pool
        out = torch.empty_like(q)
        for rows, seen in _slabs(q.shape[2], start, pool):
            p = _probabilities(q[:, :, rows], k[:, :, :seen], pool)
            out[:, :, rows] = p @ v[:, :, :seen]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows, seen in _slabs(q.shape[2], ctx.start, ctx.pool):
            query, dout, keys = q[:, :, rows], grad[:, :, rows], k[:, :, :seen]
            p = _probabilities(query, keys, ctx.pool)
            dv[:, :, :seen] += p.transpose(2, 3) @ dout
            ds = torch._softmax_backward_data(dout @ v[:, :, :seen].transpose(2, 3), p, 3, p.dtype)
            ds *= q.shape[3] ** -0.5
            dq[:, :, rows] = ds @ keys
            dk[:, :, :seen] += ds.transpose(2, 3) @ query
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _slabs(N: int, start: int, pool: int) -> Iterator[tuple[slice, int]]:
    """Rows of a slab, and how many finer cells the last of them sees."""
    for begin in range(0, N, SLAB):
        end = min(begin + SLAB, N)
        yield slice(begin, end), (start + end) * pool


def _probabilities(q: torch.Tensor, k: torch.Tensor, pool: int) -> torch.Tensor:
    """Softmax of rows of which the last sees all keys, each one before ``pool`` fewer than the next."""
    rows = q.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    last = torch.arange(rows * pool, device=q.device).div(pool, rounding_mode="floor")
    corner = last > torch.arange(rows, device=q.device)[:, None]
    scores[:, :, :, k.shape[2] - rows * pool :].masked_fill_(corner, float("-inf"))
    return torch.softmax(scores, dim=3, out=scores)


def fuse(
    fine: torch.Tensor, coarse: list[torch.Tensor], start: int, pool: int, causal: bool,
    weight: torch.Tensor, bias: torch.Tensor, raised: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """``y = x_0 + up(z_1)``; arguments as in the reference; ``raised(fine, rows, pool, offset)`` repeats and adds."""
    raised = raised or _raised
    weights = weight.split([rows.shape[2] for rows in coarse], dim=1)
    merged = linear(coarse[-1], weights[-1], bias if len(coarse) == 1 else None)
    for level in range(len(coarse) - 1, 0, -1):
        rows, offset = coarse[level - 1], start // pool**level % pool if causal else 0
        projected = linear(rows, weights[level - 1], bias if level == 1 else None)
        merged = raised(projected, merged, pool, offset)
        del projected  # else it would live through the last, largest sum
    return raised(fine, merged, pool, start % pool + 1 if causal else 0)


def _raised(fine: torch.Tensor, rows: torch.Tensor, pool: int, offset: int) -> torch.Tensor:
    """Every row ``pool`` times, from place ``offset`` on added to the finer ones."""
    return fine + rows.unsqueeze(2).expand(-1, -1, pool, -1).flatten(1, 2)[:, offset : offset + fine.shape[1]]


OPERATORS = Operators(attend, attend_below, fuse)
