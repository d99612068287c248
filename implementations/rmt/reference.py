"""Attention of a piece with all scores and a mask, as the equations say (README)."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.rmt.layer import Rows


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool, position: Position
) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]`` whose last n are the piece's own; ``[B, H, n, D]``."""
    n, K = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, n, K]
    bias = position.rectangle(n, K, K - n, like=q)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible(rows, K, full, q.device), float("-inf"))
    return scores.softmax(dim=3) @ v


def visible(rows: Rows, keys: int, full: bool, device: torch.device) -> torch.Tensor:
    """Mask ``[n, K]``: causal; ``full`` lets all read tokens see each other, and all write tokens."""
    n = sum(rows)
    mask = torch.ones(n, keys, dtype=torch.bool, device=device).tril(keys - n)
    if full:
        mask[: rows.reads, : rows.reads] = True
        mask[n - rows.writes :] = True
    return mask
