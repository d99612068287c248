"""The layer around the operator: projections and the state. All implementations share its weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.method import Dims, Output, load

from .params import WindowParams


class Cache(NamedTuple):
    """Keys and values that later tokens can still see, each ``[B, H, S, D]`` with ``S < window``."""

    k: torch.Tensor
    v: torch.Tensor


class WindowAttention(nn.Module):
    """Projections and cache around ``operator(q, k, v, window) -> [B, H, T, D]``."""

    def __init__(self, dims: Dims, params: WindowParams, operator: Callable[..., torch.Tensor]):
        super().__init__()
        self.num_heads, self.head_dim, self.window = dims.num_heads, dims.head_dim, params.window
        self.qkv = nn.Linear(dims.d_model, 3 * dims.d_model)
        self.o = nn.Linear(dims.d_model, dims.d_model)
        self.operator = operator

    def forward(self, x: torch.Tensor, state: Cache | None = None) -> Output:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=2))
        if state is not None:
            k, v = torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2)
            kept = min(self.window - 1, k.shape[2])
            # A copy: a view would keep every key alive.
            state = Cache(*(part[:, :, part.shape[2] - kept :].clone() for part in (k, v)))
        return Output(self.o(merge_heads(self.operator(q, k, v, self.window))), state)

    def init_state(self, batch_size: int) -> Cache:
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size: int, context: int) -> Cache:
        weight, kept = self.o.weight, min(self.window - 1, context)
        shape = (batch_size, self.num_heads, kept, self.head_dim)
        return Cache(*(torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2)))


def build(dims: Dims, params: WindowParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; the implementations differ in the operator alone."""
    from . import METHOD

    operator = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = [
        PreNormBlock(WindowAttention(dims, params, operator), dims) for _ in range(dims.num_layers)
    ]
    return Stack(layers).to(device, dtype)
