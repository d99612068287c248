"""All segments in one launch of the fused kernels: entries, memory and segment are two streams under one softmax.

The compression itself is the product or pooling of ``blocked``: once over the whole stream.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import relative_fused
from ctxbench.implementations.compressive_transformer.blocked import one_shot


def attend(layer: Any, x: torch.Tensor, state: Any, keep: bool) -> tuple[torch.Tensor, Any]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return one_shot(layer, x, state, keep, relative_fused.attend)
