"""Every scale as a range of keys between two lines, by kernels of our own; scales are merged by log-sum-exps.

A cell's weight, the number of its tokens, is added to its scale's log-sum-exp instead of to every score, and gradients
through the merge are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ctxbench.implementations._shared.ranges import Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations.hierarchical.blocked import fuse
from ctxbench.implementations.hierarchical.bounds import bounds
from ctxbench.implementations.hierarchical.layer import Operators
from ctxbench.implementations.hierarchical.params import Scale


def attend(
    q: torch.Tensor, levels: Sequence[torch.Tensor | tuple[torch.Tensor, ...]], scales: Sequence[Scale], start: int,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """As in the reference; keys and values of a scale may be a pair; ``line`` must be None."""
    tokens = start + q.shape[2]
    outputs, weights = [], []
    for cells, scale in zip(levels, scales, strict=True):
        held = cells[0].shape[2]
        if not held:
            continue
        low, high = bounds(scale, tokens // scale.span - held)
        out, lse = attend_ranges(q, [Range(cells[0], cells[1], low, high)], offset=start)
        outputs.append(out)
        weights.append(lse + math.log(scale.span))
    if len(outputs) == 1:
        return outputs[0]
    shares = torch.stack(weights).softmax(dim=0)[..., None]  # [scales, B, H, T, 1], float32
    mixed = outputs[0] * shares[0]
    for out, share in zip(outputs[1:], shares[1:], strict=True):
        mixed = mixed + out * share
    return mixed.to(q.dtype)


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention among the cells of one scale, ``[B, H, n, D]``."""
    return attend_ranges(q, [Range(k, v)])[0]


OPERATORS = Operators(attend, mix, fuse)
