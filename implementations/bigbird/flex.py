"""FlexAttention with the plan of blocks as its lists: a block is a tile, and none of them needs a mask."""

from __future__ import annotations

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _disable_current_modes

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.bigbird.layer import Plan
from ctxbench.implementations.bigbird.params import Pattern


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, position: Position) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape."""
    assert plan.pattern is not None, "block lists are made of what a plan was drawn from"
    mask = block_mask(plan.pattern, plan.layer, q.shape[1], q.device)
    side = next(n for n in (64, 32, 16) if plan.size % n == 0)  # of the kernel's own tiles, which divide a block
    return flex.run(q, k, v, mask, flex.biased(position, 0, q), BLOCK_M=side, BLOCK_N=side)


@functools.lru_cache(maxsize=64)
def block_mask(pattern: Pattern, layer: int, heads: int, device: torch.device) -> BlockMask:
    """Lists of all rows, head by head; for the forward pass alone, so that nothing is turned round."""
    plans = [pattern.sees(layer, head) for head in range(heads)]
    with _disable_current_modes():  # tables of the call, not tensors of the method
        counts = torch.tensor([[len(row) for row in plan] for plan in plans], dtype=torch.int32)
        listed = torch.zeros(heads, pattern.num_blocks, pattern.num_blocks, dtype=torch.int32)
        flat = [column for plan in plans for row in plan for column in row]
        listed[torch.arange(pattern.num_blocks) < counts[:, :, None]] = torch.tensor(flat, dtype=torch.int32)
        none, nothing = (torch.zeros_like(x)[None].to(device) for x in (counts, listed))
        return BlockMask.from_kv_blocks(
            none, nothing, counts[None].to(device), listed[None].to(device), BLOCK_SIZE=pattern.block_size,
            seq_lengths=(pattern.seq_len, pattern.seq_len), compute_q_blocks=False,
        )  # fmt: skip
