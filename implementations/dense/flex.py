"""PyTorch's FlexAttention: causal tiles from lists in closed form, biases added to the scores inside the kernel."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``; the last query stands at the last key."""
    offset = k.shape[2] - q.shape[2]
    seen = flex.CAUSAL if causal else flex.ALL
    return flex.attend(q, k, v, seen, offset=offset, score=flex.biased(position, offset, q))
