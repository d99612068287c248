"""Attention with all scores, as the equations say (README)."""

from __future__ import annotations

import torch

from ctxbench.implementations.segment_recurrent.layer import Look


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, look: Look) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``."""
    n, keys = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, n, K]
    bias = look.position.rectangle(n, keys, look.first, like=q)
    if bias is not None:
        scores = scores + bias
    if look.causal:
        scores = scores.masked_fill(future(n, keys, q.device), float("-inf"))
    return scores.softmax(dim=3) @ v


def future(n: int, keys: int, device: torch.device) -> torch.Tensor:
    """Mask ``[n, K]`` of the keys after each query."""
    return torch.ones(n, keys, dtype=torch.bool, device=device).triu(keys - n + 1)
