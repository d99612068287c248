"""Fused attention without a mask wherever a piece begins its segment; with a bias by distance, slabs of queries."""

from __future__ import annotations

from functools import partial

import torch

from ctxbench.implementations._shared import fused
from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.rmt.corners import by_corners
from ctxbench.implementations.rmt.layer import Rows


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool, position: Position
) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]`` whose last n are the piece's own; ``[B, H, n, D]``."""
    biased = isinstance(position, Bias)  # the fused kernel adds none by itself
    return by_corners(q, k, v, rows, full, partial(attend_slabs, position=position) if biased else fused.attend)
