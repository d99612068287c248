"""BigBird in the external construction (Zaheer et al. 2020, section 2; Ainslie et al. 2020, ETC).

Learned global tokens stand ahead of the sequence and go through all layers with it. They attend to everything and
everything attends to them; a token of the sequence also sees its neighbours within a radius. Both kinds share queries,
keys, values, norms and feed-forward network, and each has an output projection of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, merge_heads, split_heads
from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered
from ctxbench.implementations._shared.window_blocks import attend as attend_in_blocks
from ctxbench.implementations.bigbird.params import BigBirdParams
from ctxbench.method import Dims, Output, load

SHARED = "ctxbench.implementations._shared"
WINDOWED = {"triton": f"{SHARED}.window_ranges:attend", "flex": f"{SHARED}.window_flex:attend"}


def attend_windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Pattern, attend: Any = attend_in_blocks
) -> torch.Tensor:
    """``q, k, v: [B, H, g + T, D]``, global tokens first; result of that shape, by an operator over windows."""
    g = window.num_global
    rows = GlobalRows(q[:, :, :g], k, v, tuple(range(g)))
    return attend(q, k, v, rows, Scattered(k[:, :, :0], v[:, :, :0], ()), window)  # type: ignore[no-any-return]


def attend_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Pattern) -> torch.Tensor:
    """The same as one masked softmax over everything."""
    place = torch.arange(q.shape[2], device=q.device)
    far = (place[:, None] - place).abs() > window.left
    outside = place >= window.num_global
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    scores = scores.masked_fill(far & outside & outside[:, None], float("-inf"))
    return scores.softmax(dim=3) @ v


class EtcAttention(nn.Module):
    """Projections around ``operator(q, k, v, window)``; the first ``num_global`` tokens are the global ones."""

    def __init__(self, dims: Dims, params: BigBirdParams, operator: Any):
        super().__init__()
        self.num_heads, self.window, self.operator = dims.num_heads, params.window(), operator
        width = dims.d_model
        self.q, self.k, self.v, self.o, self.o_global = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x: torch.Tensor, state: None = None) -> Output:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        mixed = merge_heads(self.operator(q, k, v, self.window))
        del q, k, v  # else they would live through the output projections
        g = self.window.num_global
        return Output(torch.cat((self.o_global(mixed[:, :g]), self.o(mixed[:, g:])), dim=1))


class EtcStack(nn.Module):
    """Layers over the global tokens and the sequence; the sequence's part is the result."""

    def __init__(self, layers: list[nn.Module], num_global: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.global_tokens = nn.Parameter(torch.randn(num_global, width))

    def forward(self, x: torch.Tensor) -> Output:
        x = torch.cat((self.global_tokens.expand(x.shape[0], -1, -1), x), dim=1)
        for layer in self.layers:
            x = layer(x).y
        return Output(x[:, self.global_tokens.shape[0] :])


def build_etc(dims: Dims, params: BigBirdParams, impl: str) -> nn.Module:
    """Stack of ``num_layers`` layers; impls differ in the operator alone."""
    operator = attend_reference if impl == "reference" else attend_windowed
    if impl in WINDOWED:
        operator = functools.partial(attend_windowed, attend=load(WINDOWED[impl]))
    layers: list[nn.Module] = [PreNormBlock(EtcAttention(dims, params, operator), dims) for _ in range(dims.num_layers)]
    return EtcStack(layers, params.num_global, dims.d_model)
