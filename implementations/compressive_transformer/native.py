"""All segments in one call of the C++ kernel of ``_shared/relative_native.cpp``: entries and rows where they lie."""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import relative_native
from ctxbench.implementations.compressive_transformer.blocked import one_shot


def attend(layer: Any, x: torch.Tensor, state: Any, keep: bool) -> tuple[torch.Tensor, Any]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return one_shot(layer, x, state, keep, relative_native.attend)
