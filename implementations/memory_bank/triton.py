"""The schedule of ``blocked`` around kernels of our own: flash attention in segments and over slots, a fused gate."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations.memory_bank.blocked import schedule
from ctxbench.implementations.memory_bank.gate import Gated
from ctxbench.implementations.memory_bank.layer import Bank, MemoryBankLayer, State
from ctxbench.implementations.memory_bank.native import attend, read_slots


def run(layer: MemoryBankLayer, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State | None]:
    """``x: [B, T, d_model]`` to outputs of that shape; the state after them where one came in."""
    return schedule(layer, x, state, attend, gated_read)


def gated_read(
    layer: MemoryBankLayer, bank: Bank, x: torch.Tensor, query: torch.Tensor, half: torch.Tensor
) -> torch.Tensor:
    """``x`` and what its queries read, as much as the gate lets through."""
    q, k, v = (split_heads(part, layer.num_heads) for part in (query, bank.read_keys, bank.read_values))
    read = layer.read_o(merge_heads(read_slots(q, k, v)))
    gated: torch.Tensor = Gated.apply(x, half, read, layer.gate.weight[:, x.shape[2] :], torch.is_grad_enabled())
    return gated
