"""The pyramid as the source document sketches it, defects and all; README.md lists them.

Only what could not run otherwise is decided here: the FFN width follows ``d_ff`` (the sketch has 4 d_l), so that
``d_ff = 0`` drops it, and the pool factor is a parameter (the sketch has 2). There is no mask in either direction.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import avg_pool1d, interpolate

from ctxbench.implementations.pyramid.params import PyramidParams
from ctxbench.method import Dims


class SketchLayer(nn.Module):
    """Post-norm layer whose attention takes ``[B, T, d_l]`` for ``[tokens, batch, d_l]``, and keeps its weights."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(d_model, num_heads)
        self.norm1 = nn.LayerNorm(d_model)
        self.ffn = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model)) if d_ff else None
        self.norm2 = nn.LayerNorm(d_model) if d_ff else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.attention(x, x, x)
        x = self.norm1(x + mixed)
        if self.ffn is not None and self.norm2 is not None:
            x = self.norm2(x + self.ffn(x))
        return x


class SketchPyramid(nn.Module):
    """``num_layers // levels`` layers a level, every level with all heads; the remainder is dropped."""

    def __init__(self, dims: Dims, params: PyramidParams):
        super().__init__()
        self.pool = params.pool
        widths = [dims.d_model >> level for level in range(params.levels)]
        self.levels = nn.ModuleList(
            nn.ModuleList(
                SketchLayer(width, dims.num_heads, dims.d_ff >> level) for _ in range(dims.num_layers // params.levels)
            )
            for level, width in enumerate(widths)
        )
        self.down = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.fusion = nn.Linear(sum(widths), dims.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        cells = x
        for level, layers in enumerate(self.levels):
            for layer in layers:  # type: ignore[attr-defined]
                cells = layer(cells)
            outputs.append(cells)
            if level < len(self.down):
                pooled = avg_pool1d(cells.transpose(1, 2), kernel_size=self.pool, stride=self.pool).transpose(1, 2)
                cells = self.down[level](pooled)
        stretched = [
            cells if cells.shape[1] == x.shape[1]
            else interpolate(cells.transpose(1, 2), size=x.shape[1], mode="linear").transpose(1, 2)
            for cells in outputs
        ]  # fmt: skip
        return self.fusion(torch.cat(stretched, dim=2))
