"""The flash kernels of ``_shared/flash.py`` over all keys, or over all up to the query's own."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.flash import flash
from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    return flash(q, k, v, right=0 if causal else None)[0]
