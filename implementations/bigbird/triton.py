"""The flash kernels over lists of blocks; queries of the first and the last block see all, in launches of their own.

Nothing is gathered or copied: a tile reads the blocks of its list where they lie. The lists are the plan's own tables;
the backward pass turns them round on the device, where they are sorted by key block.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.lists import attend_listed, from_tables
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations.bigbird.layer import Plan


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, position: Position | None = None
) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape, stored as ``[B, T, H, D]``."""
    bias = None if position is None else position.compact()
    everything, size, T = [Range(k, v, start=0)], plan.size, q.shape[2]
    if plan.num_blocks <= 2:
        return attend_ranges(q, everything, bias=bias)[0]
    last = (plan.num_blocks - 1) * size
    first, final = (
        attend_ranges(q[:, :, part], everything, offset=part.start, bias=bias)[0]
        for part in (slice(0, size), slice(last, T))
    )
    above, below = plan.edges[:, :1], plan.edges[:, 1:]
    tables = [table for table in (above, plan.inner, below) if table.shape[1]]
    lists = from_tables(size, T, tables, last_listed=plan.edges.shape[0] * (plan.num_blocks - 2))
    mixed = attend_listed(q[:, :, size:last], k, v, lists, offset=size, bias=bias)
    return torch.cat([x.transpose(1, 2) for x in (first, mixed, final)], dim=1).transpose(1, 2)
