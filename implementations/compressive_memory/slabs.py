"""The schedule of ``blocked`` with plain products in place of fused attention, for bf16 on CPU."""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations.compressive_memory.blocked import Found, joined, schedule
from ctxbench.implementations.compressive_memory.layer import State


def attend(layer: Any, x: torch.Tensor, state: State, keep: bool) -> tuple[torch.Tensor, State | None]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return schedule(layer, x, state, keep, fused)


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: Found | None = None) -> torch.Tensor:
    """The last key is the last query's own; what is ``found`` stands in front and is seen by all."""
    return products.attend(q, *joined(k, v, found))
