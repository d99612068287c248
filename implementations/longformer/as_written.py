"""The source document's LongformerAttention: the mathematics of a window at the cost of dense attention.

Every forward pass fills a ``T x T`` float mask row by row in a Python loop, then computes all scores and hides most of
them. There is one set of projections, one direction, no dilation, and no state. Written anew; README.md lists what is
wrong with it.
"""

from __future__ import annotations

import math

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations.longformer.layer import LongformerAttention, State
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.method import Dims, Output


class SketchAttention(LongformerAttention):
    """The weights of the method's own layer, of which the global projections stay unused."""

    def __init__(self, dims: Dims, params: LongformerParams):
        super().__init__(dims, params)
        self.window, self.num_global = params.window, params.num_global

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        mask = self.mask(x.shape[1]).to(x.device)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(mask == 0, float("-inf"))
        return Output(self.o(merge_heads(scores.softmax(dim=3) @ v)))

    def mask(self, seq_len: int) -> torch.Tensor:
        """1 where row i may see column j, on the CPU: ``window // 2`` tokens on both sides, whatever the direction."""
        mask = torch.zeros(seq_len, seq_len)
        radius = self.window // 2
        for i, row in enumerate(mask):
            row[max(0, i - radius) : min(seq_len, i + radius + 1)] = 1
        for i in range(min(self.num_global, seq_len)):
            mask[i, :] = 1
            mask[:, i] = 1
        return mask
