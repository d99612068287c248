"""All segments at once: no layer has a recurrence, because its memory is its own input (README, one-shot form).

The operator is ``_shared.relative``, over rows alone. B batch, T tokens, R rows before them.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.relative import Geometry, attend_token
from ctxbench.implementations._shared.relative import attend as attend_staircase


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    rows = torch.cat((past, x), dim=1) if past.shape[1] else x
    params = layer.params
    if x.shape[1] == 1 and not torch.is_grad_enabled():
        seen = rows[:, max(0, rows.shape[1] - params.mem_len) :] if params.same_length else rows
        return attend_token(layer, x, seen)
    geometry = Geometry(params.segment_len, params.mem_len, params.same_length, past.shape[1], phase)
    return attend_staircase(layer, x, rows, geometry)
