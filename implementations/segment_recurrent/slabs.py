"""Both looks by plain products, for bf16 on CPU; see ``_shared/products.py``. A memory needs no padded queries here."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import products


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, begins: bool) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``; ``causal``: the last n keys are the queries' own tokens."""
    return products.attend(q, k, v, causal=causal and q.shape[2] > 1)
