"""Fused attention: ``F.scaled_dot_product_attention``, whose kernels keep no score matrix.

PyTorch aligns ``is_causal`` at the top left, so a call that continues a cache (S > T) needs an explicit mask. What the
kernel cannot add to its scores, a bias by distance or Transformer-XL's term, goes by slabs of queries.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias, Position, RelativeTerm
from ctxbench.implementations._shared.slabs import attend_slabs


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    if isinstance(position, (Bias, RelativeTerm)):
        return attend_slabs(q, k, v, causal, position)
    T, S = q.shape[2], k.shape[2]
    if causal and 1 < T < S:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=causal and T > 1)
