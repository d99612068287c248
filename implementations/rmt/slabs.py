"""Attention of a piece by plain products, for bf16 on CPU; see ``_shared/products.py``."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.rmt.corners import by_corners
from ctxbench.implementations.rmt.layer import Rows


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool, position: Position
) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]`` whose last n are the piece's own; ``[B, H, n, D]``."""
    return by_corners(q, k, v, rows, full, products.attend)
