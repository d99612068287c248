"""The source document's HierarchicalAttention, defects and all; README.md lists them. Written anew.

Every scale has its own attention with a share of the heads; coarse ones run on averages and come back through a
transposed convolution and, where the length does not divide, linear interpolation. There is no mask and no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate

from ctxbench.method import Dims, Output


class SketchAttention(nn.Module):
    """``scales`` must begin with 1: pooling and upsampling are looked up one place before their scale."""

    def __init__(self, dims: Dims, scales: Sequence[int]):
        super().__init__()
        width, coarse = dims.d_model, scales[1:]
        self.scales = tuple(scales)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, dims.num_heads // len(scales)) for _ in scales)
        self.poolings = nn.ModuleList(nn.AvgPool1d(scale, scale) for scale in coarse)
        self.upsamplings = nn.ModuleList(nn.ConvTranspose1d(width, width, scale, scale) for scale in coarse)
        self.fusion = nn.Linear(width * len(scales), width)

    def forward(self, x: torch.Tensor, state: Any = None) -> Output:
        outputs = []
        for i, scale in enumerate(self.scales):
            cells = x if scale == 1 else self.poolings[i - 1](x.transpose(1, 2)).transpose(1, 2)
            found, _ = self.attentions[i](cells, cells, cells)  # [B, n, d] is read as [n tokens, B samples, d]
            outputs.append(found if scale == 1 else self._stretched(self.upsamplings[i - 1], found, x.shape[1]))
        return Output(self.fusion(torch.cat(outputs, dim=2)))

    def _stretched(self, upsampling: nn.Module, cells: torch.Tensor, length: int) -> torch.Tensor:
        up = upsampling(cells.transpose(1, 2))
        if up.shape[2] != length:
            up = interpolate(up, size=length, mode="linear")
        return up.transpose(1, 2)
