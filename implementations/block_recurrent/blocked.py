"""Tokens attend to their window in blocks, all windows at once; what reads or writes states goes to the fused kernel.

The loop over windows is left with states: reading them, and their update. Projections of tokens are outside it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.biased_window import attend_blocks


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T) v``; the scale is in the queries. ``q: [B, H, n, D]``, result likewise."""
    return scaled_dot_product_attention(q, k, v, scale=1.0)


OPERATORS = (attend_blocks, attend)
