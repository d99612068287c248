"""Windows in blocks; what reads or writes states by plain products, for bf16 on CPU; see ``_shared/products.py``."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations._shared.biased_window import attend_blocks


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T) v``; the scale is in the queries. ``q: [B, H, n, D]``, result likewise."""
    return products.attend(q, k, v, causal=False, scale=1.0)


OPERATORS = (attend_blocks, attend)
