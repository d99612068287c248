"""The flash kernels over all keys, or all up to the query's own; for few queries, those that split a long cache."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.flash import flash
from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    if is_decoding(q, k, v):
        return decode(q, k, v, causal=causal)[0]
    return flash(q, k, v, right=0 if causal else None)[0]
