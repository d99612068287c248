"""Causal attention inside a block by plain products, for bf16 on CPU; see ``_shared/products.py``."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """``q: [B, H, n, D]``, the last n of the rows of ``k, v: [B, H, S, D]``; result ``[B, H, n, D]``."""
    return products.attend(q, k, v)
