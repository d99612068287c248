"""Fused attention: ``F.scaled_dot_product_attention``, whose kernels keep no score matrix.

PyTorch aligns ``is_causal`` at the top left, so a call that continues a cache (S > T) needs an explicit mask.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    T, S = q.shape[2], k.shape[2]
    if causal and 1 < T < S:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=causal and T > 1)
