"""Both looks by plain products, for bf16 on CPU; see ``_shared/products.py``. A memory needs no padded queries here."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations.segment_recurrent.layer import Look


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, look: Look) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``; a bias is ``[H, n, K]``, of one segment."""
    n, keys = q.shape[2], k.shape[2]
    causal = look.causal and n > 1
    bias = look.position.rectangle(n, keys, look.first, like=q)
    if bias is not None and causal:
        bias = products.hiding_later_keys(bias)
    return products.attend(q, k, v, causal=causal, bias=bias)
