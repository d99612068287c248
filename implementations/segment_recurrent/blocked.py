"""Fused attention. Torch aligns its causal form at the upper left, where memory would have to come with queries.

So it gets them: rows of zeros in front, whose results are dropped. With m items that costs m (m + 1) / 2 pairs. A mask
would cost n (n - 1) / 2, four times as many for a memory half as long as the segment, and would have to be read.
A bias by distance, which the fused kernel does not add, goes by slabs of queries, which need neither.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.segment_recurrent.layer import Look


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, look: Look) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``."""
    if isinstance(look.position, Bias):
        return attend_slabs(q, k, v, look.causal, look.position, before=look.first)
    n, keys = q.shape[2], k.shape[2]
    if not look.causal or n == 1:
        return scaled_dot_product_attention(q, k, v)
    if n == keys:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    if look.begins:
        padded = pad(q.transpose(1, 2), (0, 0, 0, 0, keys - n, 0)).transpose(1, 2)  # heads stay inside, no copy later
        return scaled_dot_product_attention(padded, k, v, is_causal=True)[:, :, keys - n :]
    visible = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible)
