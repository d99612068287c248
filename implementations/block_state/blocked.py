"""Causal attention inside a block by the fused kernel, which keeps no scores.

States are ordinary first rows of a block, so that a whole one needs no mask but the kernel's own.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import fused
from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """``q: [B, H, n, D]``, the last n of the rows of ``k, v: [B, H, S, D]``; result ``[B, H, n, D]``."""
    return fused.attend(q, k, v)
