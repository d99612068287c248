"""Fused attention without a mask wherever a piece begins its segment.

``full`` differs from causal in two corners. Read tokens see themselves only and write tokens see everything, so each
group is one more fused product without a mask, and the rows between stay causal.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations.rmt.layer import Rows


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]`` whose last n are the piece's own; ``[B, H, n, D]``."""
    if not full or not (rows.reads or rows.writes):
        return _causal(q, k, v)
    body, keys, reads = rows.reads + rows.tokens, k.shape[2] - rows.writes, rows.reads
    parts = [_causal(q[:, :, :body], k[:, :, :keys], v[:, :, :keys])]
    if reads:  # as queries; as keys all tokens see them anyway
        first = scaled_dot_product_attention(q[:, :, :reads], k[:, :, :reads], v[:, :, :reads])
        parts = [first, parts[0][:, :, reads:]]
    if rows.writes:
        parts.append(scaled_dot_product_attention(q[:, :, body:], k, v))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)  # heads inside, as they came


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal at the lower right: the last query sees every key."""
    n, keys = q.shape[2], k.shape[2]
    if 1 < n < keys:  # torch aligns is_causal at the upper left
        mask = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return scaled_dot_product_attention(q, k, v, is_causal=n > 1)
