"""Scaled dot-product attention, written out (Vaswani et al. 2017, equation 1).

B batch, H heads, T queries, S keys (the last T of them are the queries' own tokens), D head width.
"""

from __future__ import annotations

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D)) v``; ``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    T, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, T, S]
    if causal:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=3) @ v
