"""Multi-head attention with a key-value cache, in a pre-norm layer (Vaswani et al. 2017, section 3.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.method import Dims, Output, Params, load


class Cache(NamedTuple):
    """Keys, rotated where the position encoding rotates, and values of all earlier tokens, each ``[B, H, S, D]``."""

    k: torch.Tensor
    v: torch.Tensor


class Attention(nn.Module):
    """Projections, positions and cache around ``operator(q, k, v, causal, position) -> [B, H, T, D]``."""

    def __init__(self, dims: Dims, operator: Any, position: Position):
        super().__init__()
        self.num_heads, self.head_dim, self.causal = dims.num_heads, dims.head_dim, dims.causal
        self.q = nn.Linear(dims.d_model, dims.d_model)
        self.k = nn.Linear(dims.d_model, dims.d_model)
        self.v = nn.Linear(dims.d_model, dims.d_model)
        self.o = nn.Linear(dims.d_model, dims.d_model)
        self.operator, self.position = operator, position

    def forward(self, x: torch.Tensor, state: Cache | None = None) -> Output:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        past = 0 if state is None else state.k.shape[2]
        q, k = self.position.both(q, k, past)
        if state is not None:
            state = Cache(torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2))
            k, v = state
        return Output(self.o(merge_heads(self.operator(q, k, v, self.causal, self.position))), state)

    def init_state(self, batch_size: int) -> Cache:
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size: int, context: int) -> Cache:
        weight, shape = self.k.weight, (batch_size, self.num_heads, context, self.head_dim)
        return Cache(*(torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2)))


def build(dims: Dims, params: Params, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; the impls differ in the operator alone."""
    from ctxbench.implementations.dense import METHOD

    operator = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = [
        PreNormBlock(Attention(dims, operator, position), dims) for position in positions_of(dims, impl)
    ]
    return Stack(layers).to(device, dtype)
