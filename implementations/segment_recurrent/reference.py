"""Attention with all scores, as the equations say (README)."""

from __future__ import annotations

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, begins: bool) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``; ``causal``: the last n keys are the queries' own tokens."""
    n, keys = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, n, K]
    if causal:
        scores = scores.masked_fill(future(n, keys, q.device), float("-inf"))
    return scores.softmax(dim=3) @ v


def future(n: int, keys: int, device: torch.device) -> torch.Tensor:
    """Mask ``[n, K]`` of the keys after each query."""
    return torch.ones(n, keys, dtype=torch.bool, device=device).triu(keys - n + 1)
