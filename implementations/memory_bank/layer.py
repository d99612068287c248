"""The layer: local self-attention, a gated read of a bank of slots, a feed-forward network, one write a segment.

B batch, T tokens, S tokens a segment, M slots, H heads, D head width; d_model = H * D. Equations in README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import FeedForward, Stack
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.memory_bank.params import MemoryBankParams
from ctxbench.method import Dims, Output, load


class Bank(NamedTuple):
    """The slots, each ``[B, M, d_model]``: contents, their keys, and what the read attends to.

    ``read_keys`` and ``read_values`` are projections of ``keys`` and ``values``. They are carried along so that a
    write projects one row, not the bank, and a token that writes nothing projects none.
    """

    values: torch.Tensor
    keys: torch.Tensor
    read_values: torch.Tensor
    read_keys: torch.Tensor


class State(NamedTuple):
    """The bank and the segment under way.

    ``k, v: [B, H, fill, D]`` of its tokens so far, k rotated where the position encoding rotates; ``pooled:
    [B, d_model]`` the sum of their outputs, at least in fp32; ``tokens`` counts all tokens so far, so
    ``fill = tokens % S`` and ``tokens // S`` writes were made.
    """

    bank: Bank
    k: torch.Tensor
    v: torch.Tensor
    pooled: torch.Tensor
    tokens: int


class MemoryBankLayer(nn.Module):
    """Weights and state; ``schedule(layer, x, state) -> (y, state)`` is the order in which an impl computes."""

    def __init__(self, dims: Dims, params: MemoryBankParams, schedule: Any, position: Position):
        super().__init__()
        self.position = position
        d_model, num_slots = dims.d_model, params.num_slots
        self.num_heads, self.head_dim, self.segment_len = dims.num_heads, dims.head_dim, params.segment_len
        self.norm_self = nn.LayerNorm(d_model)
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.norm_read = nn.LayerNorm(d_model)
        self.read_q, self.read_k, self.read_v, self.read_o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.gate = nn.Linear(2 * d_model, d_model)
        self.norm_ffn = nn.LayerNorm(d_model) if dims.d_ff else None
        self.ffn = FeedForward(d_model, dims.d_ff) if dims.d_ff else None
        self.norm_write = nn.LayerNorm(d_model)
        self.write_key = nn.Linear(d_model, d_model)
        self.update = nn.Linear(2 * d_model, d_model)
        self.slot_logits = nn.Linear(d_model, num_slots) if params.write == "argmax" else None
        # The scales that norm_write and write_key give to what is written later.
        self.initial_values = nn.Parameter(torch.randn(num_slots, d_model))
        self.initial_keys = nn.Parameter(torch.randn(num_slots, d_model) * 3**-0.5)
        self.schedule = schedule

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        return Output(*self.schedule(self, x, state))

    def least_used(self, tokens: int) -> int:
        """Slot of the write that ends a segment after ``tokens`` tokens: written least often, lowest number first."""
        return (tokens // self.segment_len - 1) % self.initial_values.shape[0]

    def no_tokens(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``k``, ``v`` and ``pooled`` of a segment that has not begun."""
        return self._segment(batch_size, 0, torch.zeros)

    def init_state(self, batch_size: int) -> State:
        """The learned initial bank, one copy a batch row."""
        bank = (
            self.initial_values,
            self.initial_keys,
            self.read_v(self.initial_values),
            self.read_k(self.initial_keys),
        )
        return State(Bank(*(slots.repeat(batch_size, 1, 1) for slots in bank)), *self.no_tokens(batch_size), 0)

    def state_at(self, batch_size: int, context: int) -> State:
        """Random contents in the shapes that follow ``context`` tokens."""
        values, keys = (torch.randn_like(slots.expand(batch_size, -1, -1)) for slots in (self.initial_values,) * 2)
        bank = Bank(values, keys, self.read_v(values), self.read_k(keys))
        return State(bank, *self._segment(batch_size, context % self.segment_len, torch.randn), context)

    def _segment(self, batch_size: int, fill: int, make: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = self.k.weight
        k, v = (
            make(batch_size, self.num_heads, fill, self.head_dim, device=weight.device, dtype=weight.dtype)
            for _ in range(2)
        )
        summed = torch.promote_types(weight.dtype, torch.float32)
        return k, v, make(batch_size, self.num_heads * self.head_dim, device=weight.device, dtype=summed)


class MemoryBankStack(Stack):
    """The layers one after the other, each with a bank of its own."""

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        """State before the first token."""
        return tuple(layer.init_state(batch_size) for layer in self.layers)

    def state_at(self, batch_size: int, context: int) -> tuple[Any, ...]:
        """State shaped as after ``context`` tokens, contents random."""
        return tuple(layer.state_at(batch_size, context) for layer in self.layers)


def build(dims: Dims, params: MemoryBankParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; ``reference`` and ``blocked`` differ in the schedule alone."""
    from ctxbench.implementations.memory_bank import METHOD

    run = load(METHOD.impl(impl).run)
    if impl == "as_written":
        module: nn.Module = run(dims, params)
    else:
        # Slots have no position, so no distance is longer than a segment.
        positions = positions_of(dims.replace(seq_len=min(dims.seq_len, params.segment_len)), impl)
        module = MemoryBankStack([MemoryBankLayer(dims, params, run, position) for position in positions])
    return module.to(device, dtype)
