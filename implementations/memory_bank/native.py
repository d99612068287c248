"""The schedule of ``blocked`` with kernels of our own in place of PyTorch's fused attention."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import ranges
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations.memory_bank import blocked
from ctxbench.implementations.memory_bank.layer import Bank, MemoryBankLayer, State


def run(layer: MemoryBankLayer, x: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State | None]:
    """``x: [B, T, d_model]`` to outputs of that shape; the state after them where one came in."""
    return blocked.schedule(layer, x, state, attend, gated_read)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position) -> torch.Tensor:
    """Causal attention ``[B, H, T, D]``; the last query stands at the last key."""
    return ranges.attend(q, [Range(k, v, high=Line(base=1))], offset=k.shape[2] - q.shape[2])[0]


def read_slots(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What queries ``[B, H, T, D]`` read of all slots."""
    return ranges.attend(q, [Range(k, v)])[0]


def gated_read(
    layer: MemoryBankLayer, bank: Bank, x: torch.Tensor, query: torch.Tensor, half: torch.Tensor
) -> torch.Tensor:
    """``x`` and what its queries read, as much as the gate lets through."""
    return blocked.gated_read(layer, bank, x, query, half, read_slots)
