"""Causal attention inside a block with all scores (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """``q: [B, H, n, D]``, the last n of the rows of ``k, v: [B, H, S, D]``; result ``[B, H, n, D]``."""
    n, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    bias = position.rectangle(n, S, S - n, like=q)
    if bias is not None:
        scores = scores + bias
    visible = torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=3) @ v
