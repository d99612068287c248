"""Causal attention inside a block by the fused kernel, which keeps no scores.

States are ordinary first rows of a block, so that a whole one needs no mask but the kernel's own. PyTorch aligns that
one at the top left, hence an explicit one where a call continues a block.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Position


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """``q: [B, H, n, D]``, the last n of the rows of ``k, v: [B, H, S, D]``; result ``[B, H, n, D]``."""
    n, S = q.shape[2], k.shape[2]
    if 1 < n < S:
        visible = torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return scaled_dot_product_attention(q, k, v, is_causal=n > 1)
