"""Diagonal schedules (Sivtsov et al. 2025, arXiv:2506.05229): cells that do not wait for each other, together.

Where a state is local to its layer, the cell of segment t and layer l waits for (t, l - 1) and (t - 1, l) alone, so all
cells with one t + l are independent: their weights are stacked and each map is one batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


def diagonals(segments: int, depth: int) -> Iterator[range]:
    """Layers of each diagonal, the first of which is at segment 0 of layer 0; layer l is then at segment number - l."""
    for diagonal in range(segments + depth - 1):
        yield range(max(0, diagonal - segments + 1), min(depth, diagonal + 1))


class Weights:
    """Linear maps of all layers, stacked: ``weights(name, x, first)`` with ``x: [G, B, n, d]`` of G layers.

    ``names`` of maps that all layers have, with or without bias; by default those of the first layer.
    """

    def __init__(self, layers: nn.ModuleList, names: Sequence[str] = ()):
        names = names or [name for name, part in layers[0].named_modules() if isinstance(part, nn.Linear)]
        self.stacked: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for name in names:
            maps: list[Any] = [layer.get_submodule(name) for layer in layers]
            bias = None if maps[0].bias is None else torch.stack([one.bias for one in maps])
            self.stacked[name] = torch.stack([one.weight for one in maps]), bias

    def __call__(self, name: str, x: torch.Tensor, first: int) -> torch.Tensor:
        weight, bias = self.stacked[name]
        rows, turned = x.flatten(1, 2), weight[first : first + len(x)].transpose(1, 2)
        if bias is None:
            return torch.bmm(rows, turned).unflatten(1, x.shape[1:3])
        return torch.baddbmm(bias[first : first + len(x), None], rows, turned).unflatten(1, x.shape[1:3])
