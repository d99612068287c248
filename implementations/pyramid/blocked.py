"""Fused attention at every level, and a fusion that projects each level at its own resolution.

Reading is nested: the cell of level l that token i reads is the one its cell of level l - 1 reads, because
``floor(floor((i + 1) / p^(l-1)) / p) = floor((i + 1) / p^l)``. So the sum over levels runs from coarse to fine,
``z_l = x_l W_l + up(z_(l+1))``, and every repetition is by one factor p; no ``[B, T, d_1 + d_2 + ...]`` is ever built.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ctxbench.implementations.pyramid.layer import Operators


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """``q: [B, H, N, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, N, D]``; keeps no score matrix."""
    N, S = q.shape[2], k.shape[2]
    if causal and 1 < N < S:  # is_causal aligns at the top left, a continued cache needs the bottom right
        visible = torch.ones(N, S, dtype=torch.bool, device=q.device).tril(S - N)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=causal and N > 1)


def fuse(
    fine: torch.Tensor, coarse: list[torch.Tensor], start: int, pool: int, causal: bool,
    weight: torch.Tensor, bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """``y = x_0 + up(z_1)``; arguments as in the reference."""
    weights = weight.split([rows.shape[2] for rows in coarse], dim=1)
    merged = linear(coarse[-1], weights[-1], bias if len(coarse) == 1 else None)
    for level in range(len(coarse) - 1, 0, -1):
        rows, offset = coarse[level - 1], start // pool**level % pool if causal else 0
        projected = linear(rows, weights[level - 1], bias if level == 1 else None)
        merged = projected + _repeat(merged, rows.shape[1], pool, offset)
        del projected  # else it would live through the last, largest sum
    return fine + _repeat(merged, fine.shape[1], pool, start % pool + 1 if causal else 0)


def _repeat(rows: torch.Tensor, length: int, pool: int, offset: int) -> torch.Tensor:
    """Every row ``pool`` times, then ``length`` of them from ``offset`` on."""
    return rows.unsqueeze(2).expand(-1, -1, pool, -1).flatten(1, 2)[:, offset : offset + length]


OPERATORS = Operators(attend, fuse)
