"""The schedule of ``blocked`` around the flash kernels, which read retrieved and own keys where they lie."""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared import ranges
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations.compressive_memory.blocked import schedule
from ctxbench.implementations.compressive_memory.layer import Found, State


def attend(layer: Any, x: torch.Tensor, state: State, keep: bool) -> tuple[torch.Tensor, State | None]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return schedule(layer, x, state, keep, fused)


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position, found: Found | None,
    places: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """One softmax over what is ``found``, all of it, and the own keys up to the query's, as in ``blocked``.

    Of a bias the kernels in C++ alone take keys that lie elsewhere in every row of the batch.
    """
    bias, front = position.compact(), found
    if places is not None and found is None:  # keys of a segment under way, behind those that it retrieved
        P = places.shape[1]
        front, k, v = Found(k[:, :, :P], v[:, :, :P], places), k[:, :, P:], v[:, :, P:]
    own = Range(k, v, high=Line(base=1), start=0)
    seen = [own] if front is None or not front.k.shape[2] else [Range(front.k, front.v, places=front.places), own]
    return ranges.attend(q, seen, offset=k.shape[2] - q.shape[2], bias=bias)[0]
