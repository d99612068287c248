"""Longformer self-attention in a pre-norm layer, with a bounded causal state (Beltagy et al. 2020, section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations.longformer.params import LongformerParams, Pattern
from ctxbench.method import Dims, Output, load


class GlobalRows(NamedTuple):
    """The global rows of one call: their queries ``[B, H, G, D]`` and all the keys and values they see."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class State(NamedTuple):
    """What later tokens need: the prefix and the last ``Pattern.reach`` tokens, as if nothing had been between.

    ``k, v: [B, H, kept, D]``, prefix first. ``global_k, global_v: [B, H, c, D]`` hold the c prefix tokens seen so far
    in the global projections; they are empty once the prefix is complete, because its rows are final then.
    """

    k: torch.Tensor
    v: torch.Tensor
    global_k: torch.Tensor
    global_v: torch.Tensor


class LongformerAttention(nn.Module):
    """Projections and state around ``operator(q, k, v, rows, pattern) -> [B, H, T, D]``."""

    def __init__(self, dims: Dims, params: LongformerParams, operator: Any = None):
        super().__init__()
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.pattern: Pattern = params.pattern(dims.causal)
        self.separate = params.separate_global and params.num_global > 0
        width = dims.d_model
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        if self.separate:
            self.global_q, self.global_k, self.global_v = (nn.Linear(width, width) for _ in range(3))
        self.operator = operator

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        T = x.shape[1]
        kept = 0 if state is None else state.k.shape[2]  # counts all earlier tokens while the prefix is incomplete
        G = min(max(self.pattern.num_global - kept, 0), T)
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        if state is not None:
            k, v = torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2)
        rows = self._own_rows(x, G, state) if self.separate else self._shared_rows(q, k, v, kept + G, G)
        mixed = self.operator(q, k, v, rows, self.pattern)
        if state is not None:
            state = self._after(k, v, rows, kept + T)
        del q, k, v, rows  # else they would live through the output projection
        return Output(self.o(merge_heads(mixed)), state)

    def _shared_rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: int, G: int) -> GlobalRows:
        """Global rows in the projections of all other tokens; ``end`` is where the last of them stands."""
        seen = end if self.pattern.causal else k.shape[2]
        return GlobalRows(q[:, :, :G], k[:, :, :seen], v[:, :, :seen])

    def _own_rows(self, x: torch.Tensor, G: int, state: State | None) -> GlobalRows:
        """Global rows in projections of their own; a causal prefix projects its own tokens only."""
        seen = x[:, :G] if self.pattern.causal else x
        q = split_heads(self.global_q(x[:, :G]), self.num_heads)
        k, v = (split_heads(project(seen), self.num_heads) for project in (self.global_k, self.global_v))
        if state is not None:
            k, v = torch.cat((state.global_k, k), dim=2), torch.cat((state.global_v, v), dim=2)
        return GlobalRows(q, k, v)

    def _after(self, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, tokens: int) -> State:
        pattern, S = self.pattern, k.shape[2]
        keep = pattern.keeps(S)
        if keep < S:
            recent = S - pattern.reach
            k, v = (torch.cat((a[:, :, : pattern.num_global], a[:, :, recent:]), dim=2) for a in (k, v))
        pending = self.separate and tokens < pattern.num_global
        nothing = k.new_empty(k.shape[0], self.num_heads, 0, self.head_dim)
        return State(k, v, rows.k if pending else nothing, rows.v if pending else nothing)

    def init_state(self, batch_size: int) -> State:
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size: int, context: int) -> State:
        pending = context if self.separate and context < self.pattern.num_global else 0
        lengths = (self.pattern.keeps(context),) * 2 + (pending,) * 2
        shapes = [(batch_size, self.num_heads, length, self.head_dim) for length in lengths]
        weight = self.k.weight
        return State(*(torch.randn(shape, device=weight.device, dtype=weight.dtype) for shape in shapes))


def build(dims: Dims, params: LongformerParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; ``as_written`` replaces the mixer, all other impls its operator."""
    from ctxbench.implementations.longformer import METHOD

    seam = load(METHOD.impl(impl).run)

    def mixer() -> nn.Module:
        return seam(dims, params) if impl == "as_written" else LongformerAttention(dims, params, seam)

    layers: list[nn.Module] = [PreNormBlock(mixer(), dims) for _ in range(dims.num_layers)]
    return Stack(layers).to(device, dtype)
