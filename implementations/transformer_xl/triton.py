"""All segments in one launch of the fused kernels of ``_shared/relative_kernels.py``: no scores, no shifted copy."""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import relative_fused
from ctxbench.implementations._shared.relative import Geometry


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    rows = torch.cat((past, x), dim=1) if past.shape[1] else x
    params = layer.params
    geometry = Geometry(params.segment_len, params.mem_len, params.same_length, past.shape[1], phase)
    return relative_fused.attend(layer, x, rows, geometry)
