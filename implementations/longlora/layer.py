"""Multi-head attention inside groups that half of the heads shift, in a pre-norm layer (Chen et al. 2024, section 3.2).

B batch, T tokens, H heads, D head width; d_model = H * D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.longlora.params import LongLoRAParams, group_size
from ctxbench.method import Dims, Output, load


class ShiftedAttention(nn.Module):
    """Projections around ``operator(q, k, v, group, wrap, position) -> [B, H, T, D]``; there is no state."""

    def __init__(self, dims: Dims, params: LongLoRAParams, operator: Any, position: Position):
        super().__init__()
        self.num_heads, self.params, self.operator = dims.num_heads, params, operator
        self.q, self.k, self.v, self.o = (nn.Linear(dims.d_model, dims.d_model) for _ in range(4))
        self.position = position

    def forward(self, x: torch.Tensor, state: None = None) -> Output:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        q, k = self.position.both(q, k, 0)  # true positions, before any shift
        mixed = self.operator(q, k, v, group_size(x.shape[1], self.params), self.params.wrap, self.position)
        del q, k, v
        return Output(self.o(merge_heads(mixed)))


def build(dims: Dims, params: LongLoRAParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; the impls differ in the operator alone."""
    from ctxbench.implementations.longlora import METHOD

    operator = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = [
        PreNormBlock(ShiftedAttention(dims, params, operator, position), dims) for position in positions_of(dims, impl)
    ]
    return Stack(layers).to(device, dtype)
