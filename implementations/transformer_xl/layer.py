"""Relative attention over a memory of the layer's own earlier inputs, in a post-norm layer (Dai et al. 2019).

B batch, T tokens, H heads, D head width, S segment_len, M mem_len.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared import positions
from ctxbench.implementations._shared.blocks import PostNormBlock, Stack
from ctxbench.implementations.transformer_xl.params import TransformerXLParams
from ctxbench.method import Dims, Output, load


class State(NamedTuple):
    """What the next token needs: inputs of the memory and of the current segment so far, detached.

    ``hidden: [B, R, d_model]``, R = min(t, M + phase) after t tokens (M + phase where the start is zeros);
    ``phase`` = t mod S.
    """

    hidden: torch.Tensor
    phase: int


class RelativeAttention(nn.Module):
    """Weights, position table and state around ``attend(layer, x, past, phase) -> [B, T, d_model]``.

    ``content_bias`` is the paper's u, ``position_bias`` its v; ``table`` holds one sinusoid row per distance.
    """

    table: torch.Tensor

    def __init__(self, dims: Dims, params: TransformerXLParams, attend: Any):
        super().__init__()
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.params, self.attend = params, attend
        self.q, self.k, self.v, self.o, self.r = (nn.Linear(dims.d_model, dims.d_model, bias=False) for _ in range(5))
        self.content_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim).normal_(std=0.02))
        self.position_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim).normal_(std=0.02))
        table = sinusoids(params.mem_len + params.segment_len, dims.d_model, params.clamp_len)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        past, phase = self.init_state(x.shape[0]) if state is None else state
        y = self.o(self.attend(self, x, past, phase))
        return Output(y, None if state is None else self.advance(past, phase, x))

    def advance(self, past: torch.Tensor, phase: int, x: torch.Tensor) -> State:
        """State after the tokens of ``x``; copies, so that no longer tensor stays alive behind it."""
        phase = (phase + x.shape[1]) % self.params.segment_len
        keep = min(past.shape[1] + x.shape[1], self.params.mem_len + phase)
        new = min(keep, x.shape[1])
        old = past[:, past.shape[1] - (keep - new) :]
        return State(torch.cat((old, x[:, x.shape[1] - new :]), dim=1).detach(), phase)

    def init_state(self, batch_size: int) -> State:
        rows = self.params.mem_len if self.params.start == "zeros" else 0
        return State(self.q.weight.new_zeros(batch_size, rows, self.q.in_features), 0)

    def state_at(self, batch_size: int, context: int) -> State:
        weight, phase = self.q.weight, context % self.params.segment_len
        rows = self.params.mem_len + phase
        if self.params.start == "empty":
            rows = min(rows, context)
        hidden = torch.randn(batch_size, rows, self.q.in_features, device=weight.device, dtype=weight.dtype)
        return State(hidden, phase)


def sinusoids(distances: int, d_model: int, clamp_len: int = 0) -> torch.Tensor:
    """Rows for distances 0, 1, ...: all sines, then all cosines; float64 ``[distances, d_model]``."""
    distance = torch.arange(distances, dtype=torch.float64)
    if clamp_len:
        distance = distance.clamp(max=clamp_len)
    return positions.sinusoids(distance, d_model)


def build(dims: Dims, params: TransformerXLParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers with equal weights in every impl; ``as_written`` brings a stack of its own."""
    from ctxbench.implementations.transformer_xl import METHOD

    run = load(METHOD.impl(impl).run)
    if impl == "as_written":
        return run(dims, params).to(device, dtype)
    layers: list[nn.Module] = [
        PostNormBlock(RelativeAttention(dims, params, run), dims) for _ in range(dims.num_layers)
    ]
    return Stack(layers).to(device, dtype)
