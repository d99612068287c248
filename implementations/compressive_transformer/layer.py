"""Relative attention over compressed entries, memory and segment, in a post-norm layer (Rae et al. 2019).

B batch, T tokens, S segment_len, M mem_len, C compressed_len, c rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PostNormBlock, Stack
from ctxbench.implementations._shared.positions import sinusoids
from ctxbench.implementations.compressive_transformer.compression import compression_for, most_used
from ctxbench.implementations.compressive_transformer.losses import (
    AddedGradients,
    attention_reconstruction,
    auto_encoding,
)
from ctxbench.implementations.compressive_transformer.params import CompressiveTransformerParams
from ctxbench.method import Dims, Output, load


class State(NamedTuple):
    """What the next token needs, detached; after t tokens, of which E = max(0, (t - t mod S) - M) left the memory.

    ``compressed: [B, min(C, E / c), d_model]``; ``hidden: [B, t - E, d_model]``, inputs of the memory and of the
    current segment so far; ``usage: [B, t - E]``, the attention that each of these got from all queries and heads so
    far (most_used, else ``[B, 0]``), at least in fp32; ``phase`` = t mod S.
    """

    compressed: torch.Tensor
    hidden: torch.Tensor
    usage: torch.Tensor
    phase: int


class CompressiveAttention(nn.Module):
    """Weights, table of distances and state around ``attend(layer, x, state, keep) -> (mixed, state)``.

    ``content_bias`` and ``position_bias`` are Transformer-XL's u and v; ``table`` has one sinusoid row a distance.
    """

    table: torch.Tensor

    def __init__(self, dims: Dims, params: CompressiveTransformerParams, attend: Any):
        super().__init__()
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.params, self.attend = params, attend
        self.q, self.k, self.v, self.o, self.r = (nn.Linear(dims.d_model, dims.d_model, bias=False) for _ in range(5))
        self.content_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim).normal_(std=0.02))
        self.position_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim).normal_(std=0.02))
        self.compress = compression_for(dims.d_model, params)
        decodes = params.trained and params.auxiliary == "auto_encoding"
        self.decode = nn.Linear(dims.d_model, params.rate * dims.d_model) if decodes else None
        distances = torch.arange(params.compressed_len + params.mem_len + params.segment_len, dtype=torch.float64)
        self.register_buffer("table", sinusoids(distances, dims.d_model), persistent=False)

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        before = self.init_state(x.shape[0]) if state is None else state
        mixed, after = self.attend(self, x, before, keep=state is not None)
        y = self.o(mixed)
        if self.training and torch.is_grad_enabled() and self.params.trained and self.params.auxiliary != "none":
            y = self._with_losses(y, x.detach(), before)
        return Output(y, after)

    def advance(self, state: State, segment: torch.Tensor, usage: torch.Tensor) -> State:
        """State after the tokens of ``segment``, which end no later than their segment.

        Copies, so that no longer tensor stays alive behind it. ``usage`` includes these tokens and their queries.
        """
        params = self.params
        hidden = torch.cat((state.hidden, segment), dim=1).detach()
        phase = (state.phase + segment.shape[1]) % params.segment_len
        evicted = max(0, hidden.shape[1] - params.mem_len) if phase == 0 else 0
        if not evicted:
            return State(state.compressed, hidden, usage, phase)
        compressed = state.compressed
        if params.compressed_len:
            compressed = self.shifted_in(compressed, self.entries(hidden[:, :evicted], usage))
        return State(compressed, hidden[:, evicted:].clone(), usage[:, evicted:].clone(), phase)

    @torch.no_grad()
    def entries(self, old: torch.Tensor, usage: torch.Tensor) -> torch.Tensor:
        """Compression of tokens that leave together, ``[B, n / c, d_model]``; ``usage`` of them and all later ones."""
        if self.compress is not None:
            return self.compress(old)
        queries = torch.arange(usage.shape[1], 0, -1, device=usage.device)  # that could see a token, itself included
        return most_used(old, (usage / queries)[:, : old.shape[1]], self.params.rate)

    def shifted_in(self, compressed: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The last C entries, a copy."""
        entries = torch.cat((compressed, new), dim=1)
        surplus = max(0, entries.shape[1] - self.params.compressed_len)
        return entries[:, surplus:].clone() if surplus else entries

    def losses(self, x: torch.Tensor, state: State) -> Iterator[torch.Tensor]:
        """The auxiliary loss of every compression that a later token of ``x: [B, T, d_model]`` sees."""
        if self.compress is None:
            return
        S, M = self.params.segment_len, self.params.mem_len
        rows = torch.cat((state.hidden, x), dim=1)
        left = 0
        for begin in range(state.hidden.shape[1] - state.phase + S, rows.shape[1], S):
            old = rows[:, left : max(0, begin - M)]
            left += old.shape[1]
            if not old.shape[1]:
                continue
            entries = self.compress(old)
            if self.decode is not None:
                yield auto_encoding(self.decode, old, entries)
            else:
                yield attention_reconstruction(self, rows[:, begin - S : begin], old, entries)

    def _with_losses(self, y: torch.Tensor, x: torch.Tensor, state: State) -> torch.Tensor:
        """``y``, with the gradients of the auxiliary losses behind it; each graph ends with its segment."""
        parts = [self.compress] if self.decode is None else [self.compress, self.decode]
        weights = [weight for part in parts if part is not None for weight in part.parameters()]
        summed: list[torch.Tensor] | None = None
        for loss in self.losses(x, state):
            found = torch.autograd.grad(loss, weights)
            summed = list(found) if summed is None else [a.add_(b) for a, b in zip(summed, found, strict=True)]
            del loss, found
        return y if summed is None else AddedGradients.apply(y, summed, *weights)

    def init_state(self, batch_size: int) -> State:
        return self._state(batch_size, 0, torch.zeros)

    def state_at(self, batch_size: int, context: int) -> State:
        return self._state(batch_size, context, torch.randn)

    def _state(self, batch_size: int, context: int, make: Any) -> State:
        params, weight = self.params, self.q.weight
        phase = context % params.segment_len
        evicted = max(0, context - phase - params.mem_len)
        entries = min(params.compressed_len, evicted // params.rate)
        compressed, hidden = (
            make(batch_size, rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
            for rows in (entries, context - evicted)
        )
        usage = make(
            batch_size, context - evicted if self.counts_usage else 0, device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )  # fmt: skip
        return State(compressed, hidden, usage.abs(), phase)

    @property
    def counts_usage(self) -> bool:
        """Whether the state must know how much attention a token got."""
        return self.params.compression == "most_used" and self.params.compressed_len > 0


def build(dims: Dims, params: CompressiveTransformerParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers with equal weights in every impl."""
    from ctxbench.implementations.compressive_transformer import METHOD

    attend = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = [
        PostNormBlock(CompressiveAttention(dims, params, attend), dims) for _ in range(dims.num_layers)
    ]
    return Stack(layers).to(device, dtype)
