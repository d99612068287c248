"""The schedule of ``blocked`` with plain products in place of fused attention, for bf16 on CPU."""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations._shared.placed import Placed
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.compressive_memory.blocked import joined, schedule
from ctxbench.implementations.compressive_memory.layer import Found, State


def attend(layer: Any, x: torch.Tensor, state: State, keep: bool) -> tuple[torch.Tensor, State | None]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return schedule(layer, x, state, keep, fused)


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position, found: Found | None,
    places: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The last key is the last query's own; what is ``found`` stands in front and is seen by all. As in ``blocked``."""
    k, v = joined(k, v, found)
    compact = position.compact()
    if places is None or compact is None:
        return products.attend(q, k, v)
    m, own = q.shape[2], k.shape[2] - places.shape[1]
    bias = position.rectangle(m, own, own - m, like=q)
    assert bias is not None
    return products.attend(q, k, v, bias=products.hiding_later_keys(bias), placed=Placed(compact, places, own - m))
