"""FlexAttention with the plan of blocks as its lists: a block is a tile, and none of them needs a mask."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

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
    mask = block_mask(plan.pattern, plan.layer, q.shape[1], q.device, torch.is_grad_enabled())
    return flex.run(q, k, v, mask, flex.biased(position, 0, q), block=plan.size)


@functools.lru_cache(maxsize=64)
def block_mask(pattern: Pattern, layer: int, heads: int, device: torch.device, turned: bool) -> BlockMask:
    """Lists of all rows, head by head, and, for the backward pass alone, ``turned``: those of all columns."""
    plans = [pattern.sees(layer, head) for head in range(heads)]
    with _disable_current_modes():  # tables of the call, not tensors of the method
        kv_none, kv_nothing, kv_counts, kv_listed = _lists(plans, device)
        q_none = q_nothing = q_counts = q_listed = None
        if turned:
            q_none, q_nothing, q_counts, q_listed = _lists([_turned(plan) for plan in plans], device)
        seen = torch.zeros(kv_listed.shape[1:], dtype=torch.bool)
        for table, plan in zip(seen, plans, strict=True):
            for row, columns in enumerate(plan):
                table[row, list(columns)] = True
        length = pattern.seq_len
        return BlockMask(
            (length, length), kv_none, kv_nothing, kv_counts, kv_listed, q_none, q_nothing, q_counts, q_listed,
            BLOCK_SIZE=(pattern.block_size, pattern.block_size), mask_mod=_visible(seen.to(device), pattern),
        )  # fmt: skip


def _turned(plan: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of each column, ascending."""
    columns: list[list[int]] = [[] for _ in plan]
    for row, seen in enumerate(plan):
        for column in seen:
            columns[column].append(row)
    return columns


def _lists(plans: Sequence[Sequence[Sequence[int]]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """What BlockMask wants: counts and lists of blocks with a mask, of which there are none, and of those without."""
    blocks = len(plans[0])
    counts = torch.tensor([[len(one) for one in plan] for plan in plans], dtype=torch.int32)
    listed = torch.zeros(len(plans), blocks, blocks, dtype=torch.int32)
    flat = [block for plan in plans for one in plan for block in one]
    listed[torch.arange(blocks) < counts[:, :, None]] = torch.tensor(flat, dtype=torch.int32)
    counts, listed = counts[None].to(device), listed[None].to(device)
    return torch.zeros_like(counts), torch.zeros_like(listed), counts, listed


def _visible(seen: torch.Tensor, pattern: Pattern) -> flex.Score:
    """FlexAttention's ``mask_mod``, which no kernel asks for: the lists say the same."""
    size = pattern.block_size

    def within(b: Any, h: Any, row: Any, key: Any) -> Any:
        return seen[h, row // size, key // size]

    return within
