"""FlexAttention over tokens and cells of all scales under one softmax: their keys one after the other in one tensor.

Each scale begins at a tile of its own, so that its block lists are those of its lines alone; what fills up its last
tile is seen by nobody. A cell's weight, the number of its tokens, is added to its scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.flex_table import TILE
from ctxbench.implementations.hierarchical.blocked import fuse
from ctxbench.implementations.hierarchical.bounds import bounds
from ctxbench.implementations.hierarchical.layer import Operators
from ctxbench.implementations.hierarchical.params import Scale


def attend(
    q: torch.Tensor, levels: Sequence[torch.Tensor], scales: Sequence[Scale], start: int,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """As in the reference, of a whole sequence: ``start`` must be 0, and ``line`` None."""
    parts: list[torch.Tensor] = []
    seen: list[flex.Between] = []
    begin = 0
    for cells, scale in zip(levels, scales, strict=True):
        count = cells.shape[3]
        if count:
            seen.append(flex.Between(*bounds(scale, 0), begin, count))
            parts += [cells, cells.new_zeros(*cells.shape[:3], -count % TILE, cells.shape[4])]
            begin += count + -count % TILE
    k, v = torch.cat(parts, dim=3)
    weight = weighed([one.begin for one in seen[1:]], math.log(scales[1].span)) if len(seen) > 1 else None
    return flex.attend(q, k, v, seen, score=weight)


def weighed(begins: Sequence[int], step: float) -> flex.Score:
    """``step`` more from each of ``begins`` on: the logarithm of a cell's tokens, whose number grows by one factor."""

    def score(value: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        for begin in begins:
            value = torch.where(key >= begin, value + step, value)
        return value

    return score


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention among the cells of one scale, ``[B, H, n, D]``."""
    return flex.attend(q, k, v, flex.ALL)


OPERATORS = Operators(attend, mix, fuse)
