"""Plain products in bf16, a slab of queries and a few heads at a time, so that the scores stay in the caches.

PyTorch's fused kernel on CPU reaches a third of what the same products reach in bf16. In fp32 it is within a tenth of
them, and there is nothing to gain.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations._shared.staircase import BLOCK

SCORES = 2**20  # elements of a slab's scores: 2 MiB beside as many probabilities


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    B, H = q.shape[:2]
    # Batch and heads become one dimension, else every product would copy its operands to make them so.
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    heads = max(1, SCORES // (BLOCK * max(k.shape[2], 1)))
    parts = zip(q.split(heads, dim=1), k.split(heads, dim=1), v.split(heads, dim=1), strict=True)
    outputs = [attend_slabs(*part, causal=causal, position=position) for part in parts]
    return torch.cat(outputs, dim=1).view(B, H, *q.shape[2:])
