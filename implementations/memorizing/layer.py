"""A sliding-window layer with a first-in first-out memory of its own past keys and values (Wu et al. 2022, section 3).

B batch, H heads, T tokens, D head width, W window, S segment_len, M memory_len; keys are unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.biased_window import WindowAttention, last
from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads
from ctxbench.implementations._shared.positions import Position, positions_for
from ctxbench.implementations.memorizing.params import MemorizingParams, memory_layer
from ctxbench.method import Dims, Output, load

SCALE = 20.0  # initial scale of the cosines, as in the public package of the method


class State(NamedTuple):
    """What the next token needs, detached; all but ``tokens``, their number so far, is ``[B, H, rows, D]``.

    ``memory_k, memory_v``: the last ``min(M, s)`` pairs before s, the first token of the current segment, oldest
    first. ``k, v``: the last ``min(t, max(t - s, W - 1))`` pairs. Until its segment ends the memory is handed on
    as it is: no token pays for copying it.
    """

    memory_k: torch.Tensor
    memory_v: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tokens: int


class Operators(NamedTuple):
    """The seam between implementations.

    Attributes:
        window: ``(q, k, v, bias)``, see ``_shared.biased_window``.
        lookup: ``(q, memory_k, memory_v, top_k)``, one segment's queries, ``[B, H, n, D]``.
        whole: ``(q, k, v, top_k, segment_len, memory_len)``: all lookups of a call that begins the sequence, whose keys
            and values are the call's own; None where they go segment by segment.
        biased: ``window`` where there is an encoding by distance; None where it is the same.
    """

    window: Callable[..., torch.Tensor]
    lookup: Callable[..., torch.Tensor]
    whole: Callable[..., torch.Tensor] | None = None
    biased: Callable[..., torch.Tensor] | None = None


class MemoryAttention(WindowAttention):
    """Local attention and lookups in the memory, mixed by a gate a head."""

    def __init__(self, dims: Dims, params: MemorizingParams, position: Position, operators: Operators):
        super().__init__(dims, params.window, position, operators.window, SCALE)
        self.params, self.lookup, self.whole = params, operators.lookup, operators.whole
        self.gate = nn.Parameter(torch.zeros(dims.num_heads))

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:  # type: ignore[override]
        q, k, v = self.project(x)
        before = state or State(*(k[:, :, :0],) * 4, 0)
        if before.k.shape[2]:
            k, v = torch.cat((before.k, k), dim=2), torch.cat((before.v, v), dim=2)
        share = torch.sigmoid(self.gate)[:, None, None]
        mixed = (1 - share) * self.operator(q, k, v, self.bias())
        if self.params.memory_len:
            mixed = mixed + share * self.recall(q, k, v, before)
        if state is not None:
            state = self.advance(k, v, before, x.shape[1])
        del q, k, v, before  # else they would live through the output projection
        return Output(self.o(merge_heads(mixed)), state)

    def recall(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: State) -> torch.Tensor:
        """What each query finds in the memory of its segment, ``[B, H, T, D]``; 0 where that is empty.

        The memory of a segment is made of keys and values that no earlier lookup changes: there is no recurrence.
        """
        S, T = self.params.segment_len, q.shape[2]
        top_k = self.params.top_k if self.params.lookup == "topk" else None
        if self.whole is not None and not before.tokens:
            return self.whole(q, k, v, top_k, S, self.params.memory_len)
        found = []
        for begin in range(-(before.tokens % S), T, S):
            part = q[:, :, max(begin, 0) : begin + S]
            memory = self.remembered(k, v, before, T, begin)
            found.append(self.lookup(part, *memory, top_k) if memory[0].shape[2] else torch.zeros_like(part))
        return torch.cat(found, dim=2)

    def remembered(
        self, k: torch.Tensor, v: torch.Tensor, before: State, length: int, begin: int, copied: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory of the segment that begins at token ``begin`` of the call; views where it is in one piece.

        ``copied``: never views of anything longer.
        """
        M, S = self.params.memory_len, self.params.segment_len
        written = begin + before.tokens % S  # tokens that entered the memory in this call
        if written == 0:
            return before.memory_k, before.memory_v
        end = k.shape[2] - length + begin
        own = slice(end - min(written, M), end)
        kept = min(M - min(written, M), before.memory_k.shape[2])
        if not kept and not copied:
            return k[:, :, own].detach(), v[:, :, own].detach()
        oldest = before.memory_k.shape[2] - kept
        pairs = ((before.memory_k, k), (before.memory_v, v))
        return tuple(torch.cat((old[:, :, oldest:], new[:, :, own].detach()), dim=2) for old, new in pairs)  # type: ignore[return-value]

    def advance(self, k: torch.Tensor, v: torch.Tensor, before: State, length: int) -> State:
        """State after the call; copies, so that no longer tensor stays alive behind it."""
        S, M, tokens = self.params.segment_len, self.params.memory_len, before.tokens + length
        memory = before.memory_k, before.memory_v
        if M and tokens // S > before.tokens // S:
            memory = self.remembered(k, v, before, length, length - tokens % S, copied=True)
        return State(*memory, *last([(k, v)], max(tokens % S if M else 0, self.window - 1)), tokens)

    def state_at(self, batch_size: int, context: int) -> State:
        S, M = self.params.segment_len, self.params.memory_len
        phase = context % S if M else 0
        memory_k, memory_v = self.random_rows(batch_size, min(M, context - context % S), 2)
        k, v = self.random_rows(batch_size, min(context, max(phase, self.window - 1)), 2)
        return State(memory_k, memory_v, k, v, context)


def build(dims: Dims, params: MemorizingParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers, one of them with the memory; impls differ in their two operators."""
    from ctxbench.implementations.memorizing import METHOD

    operators: Operators = load(METHOD.impl(impl).run)
    if operators.biased is not None and dims.position != "none":
        operators = operators._replace(window=operators.biased)
    layers: list[nn.Module] = []
    for index, position in enumerate(positions_for(dims)):
        if index == memory_layer(dims.num_layers):
            layers.append(PreNormBlock(MemoryAttention(dims, params, position, operators), dims))
        else:
            layers.append(PreNormBlock(WindowAttention(dims, params.window, position, operators.window, SCALE), dims))
    return Stack(layers).to(device, dtype)
