"""The schedule of ``blocked`` with plain products in place of fused attention, for bf16 on CPU."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import products
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.memory_bank import blocked
from ctxbench.implementations.memory_bank.layer import Bank, MemoryBankLayer, State


def run(layer: MemoryBankLayer, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State | None]:
    """``x: [B, T, d_model]`` to outputs of that shape; the state after them where one came in."""
    return blocked.schedule(layer, x, state, attend, gated_read)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """Causal attention ``[B, H, T, D]``; the last query stands at the last key."""
    return products.attend(q, k, v)


def gated_read(
    layer: MemoryBankLayer, bank: Bank, x: torch.Tensor, query: torch.Tensor, half: torch.Tensor
) -> torch.Tensor:
    """``x`` and what its queries read, as much as the gate lets through."""
    return blocked.gated_read(layer, bank, x, query, half, products.everything)
