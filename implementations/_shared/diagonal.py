"""Diagonal schedules (Sivtsov et al. 2025, arXiv:2506.05229): cells that do not wait for each other, together.

Where a state is local to its layer, the cell of segment t and layer l waits for (t, l - 1) and (t - 1, l) alone, so all
cells with one t + l are independent: their weights are stacked and each map is one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def diagonals(segments: int, depth: int) -> Iterator[range]:
    """Layers of each diagonal, the first of which is at segment 0 of layer 0; layer l is then at segment number - l."""
    for diagonal in range(segments + depth - 1):
        yield range(max(0, diagonal - segments + 1), min(depth, diagonal + 1))


class Weights:
    """Linear maps of all layers, stacked: ``weights(name, x, first)`` with ``x: [G, B, n, d]`` of G layers."""

    def __init__(self, layers: nn.ModuleList):
        names = [name for name, part in layers[0].named_modules() if isinstance(part, nn.Linear)]
        self.stacked = {}
        for name in names:
            maps: list[Any] = [layer.get_submodule(name) for layer in layers]
            self.stacked[name] = tuple(torch.stack([getattr(one, kind) for one in maps]) for kind in ("weight", "bias"))

    def __call__(self, name: str, x: torch.Tensor, first: int) -> torch.Tensor:
        weight, bias = (part[first : first + len(x)] for part in self.stacked[name])
        return torch.baddbmm(bias[:, None], x.flatten(1, 2), weight.transpose(1, 2)).unflatten(1, x.shape[1:3])
