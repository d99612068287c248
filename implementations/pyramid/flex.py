"""FlexAttention at every level; queries are pooled with their keys, so that all levels are alike."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.lines import Line
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.pyramid.blocked import fuse
from ctxbench.implementations.pyramid.layer import Operators


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position, span: int
) -> torch.Tensor:
    """As in the reference, of positions those that rotate; the last query stands at the last key."""
    return flex.attend(q, k, v, flex.CAUSAL if causal else flex.ALL, offset=k.shape[2] - q.shape[2])


def attend_below(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, pool: int, causal: bool
) -> torch.Tensor:
    """As in the reference: the line of the keys rises by ``pool`` a query."""
    complete = Line(stride=pool, base=pool) if causal else None
    return flex.attend(q, k, v, [flex.Between(high=complete)], offset=start)


OPERATORS = Operators(attend, attend_below, fuse)
