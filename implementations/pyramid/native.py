"""Kernels of our own at every level: causal cells over cells, pooled queries over the finer cells they are made of."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations.pyramid.blocked import fuse
from ctxbench.implementations.pyramid.layer import Operators


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position, span: int
) -> torch.Tensor:
    """As in the reference, of positions those that rotate; the last query stands at the last key."""
    own = Line(base=1) if causal else None
    return attend_ranges(q, [Range(k, v, high=own)], offset=k.shape[2] - q.shape[2])[0]


def attend_below(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, pool: int, causal: bool
) -> torch.Tensor:
    """As in the reference: the line of the keys rises by ``pool`` a query."""
    complete = Line(stride=pool, base=pool) if causal else None
    return attend_ranges(q, [Range(k, v, high=complete)], offset=start)[0]


OPERATORS = Operators(attend, attend_below, fuse)
