"""PyTorch's fused attention, causal at the lower right: where keys were known before, the last query sees them all."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``.

    PyTorch aligns ``is_causal`` at the upper left, hence a mask where n < K.
    """
    n, K = q.shape[2], k.shape[2]
    if causal and 1 < n < K:
        visible = torch.ones(n, K, dtype=torch.bool, device=q.device).tril(K - n)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=causal and n > 1)
