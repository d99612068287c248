"""Local attention and lookup with all their scores, as in the paper (Wu et al. 2022, section 3.2)."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.biased_window import attend_plain
from ctxbench.implementations.memorizing.layer import Operators


def lookup(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Attention of ``q: [B, H, n, D]`` over the memory ``k, v: [B, H, m, D]``, or over each query's best keys."""
    scores = q @ k.transpose(2, 3)
    if top_k is None or top_k >= k.shape[2]:
        return scores.softmax(dim=3) @ v
    best, index = scores.topk(top_k, dim=3)
    return torch.zeros_like(scores).scatter(3, index, best.softmax(dim=3)) @ v


OPERATORS = Operators(attend_plain, lookup)
