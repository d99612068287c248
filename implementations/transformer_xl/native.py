"""All segments in one call of the C++ kernel of ``_shared/relative_native.cpp``: its scores stay in the caches."""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import relative_native
from ctxbench.implementations._shared.relative import Geometry


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    rows = torch.cat((past, x), dim=1) if past.shape[1] else x
    params = layer.params
    geometry = Geometry(params.segment_len, params.mem_len, params.same_length, past.shape[1], phase)
    return relative_native.attend(layer, x, rows, geometry)
