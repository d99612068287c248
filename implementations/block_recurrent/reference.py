"""Windows one after the other and plain attention, all scores kept (Hutchins et al. 2022, section 3)."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.biased_window import attend_plain


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T) v``; the scale is in the queries. ``q: [B, H, n, D]``, result likewise."""
    return (q @ k.transpose(2, 3)).softmax(dim=3) @ v


OPERATORS = (attend_plain, attend)
