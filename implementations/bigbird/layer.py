"""BigBird self-attention (Zaheer et al. 2020, internal transformer construction) in a pre-norm layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.bigbird.params import BigBirdParams, Pattern
from ctxbench.method import Dims, Output, load


class Plan(NamedTuple):
    """Columns that the rows between the first and the last see, head by head, ascending, so that the last ends a list.

    Rows next to the ends see one column less than the others, because a neighbour of theirs is global anyway.

    Attributes:
        size: tokens of a block.
        num_blocks: blocks of the sequence.
        edges: ``[H, n, columns]``, rows 1 and ``num_blocks - 2`` as far as there are any.
        inner: ``[H, n, columns]``, rows ``2 .. num_blocks - 3``.
        pattern, layer: what the plan was drawn from.
    """

    size: int
    num_blocks: int
    edges: torch.Tensor
    inner: torch.Tensor
    pattern: Pattern | None = None
    layer: int = 0


class BigBirdAttention(nn.Module):
    """Projections around ``operator(q, k, v, plan, position) -> [B, H, T, D]``; the plan is made here."""

    def __init__(self, dims: Dims, params: BigBirdParams, layer: int, operator: Any, position: Position):
        super().__init__()
        self.seq_len, self.num_heads, self.layer = dims.seq_len, dims.num_heads, layer
        self.pattern: Pattern = params.pattern(dims.seq_len, dims.num_heads)
        width = dims.d_model
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.operator, self.position = operator, position
        plans = [self.pattern.sees(layer, head) for head in range(dims.num_heads)]
        last = self.pattern.num_blocks - 1
        ends = [row for row in (1, last - 1) if 0 < row < last]
        self.register_buffer("edges", _table(plans, list(dict.fromkeys(ends))), persistent=False)
        self.register_buffer("inner", _table(plans, list(range(2, last - 1))), persistent=False)

    def forward(self, x: torch.Tensor, state: None = None) -> Output:
        if x.shape[1] != self.seq_len:
            raise ValueError(f"this plan of blocks is for {self.seq_len} tokens, received {x.shape[1]}; build anew")
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        q, k = self.position.rotate_both(q, k, 0)
        sizes = self.pattern.block_size, self.pattern.num_blocks
        plan = Plan(*sizes, self.edges, self.inner, self.pattern, self.layer)  # type: ignore[arg-type]
        mixed = self.operator(q, k, v, plan, self.position)
        del q, k, v  # else they would live through the output projection
        return Output(self.o(merge_heads(mixed)))


def _table(plans: list[tuple[tuple[int, ...], ...]], rows: list[int]) -> torch.Tensor:
    table = [[plan[row] for row in rows] for plan in plans]
    return torch.tensor(table, dtype=torch.int64) if rows else torch.empty(len(plans), 0, 0, dtype=torch.int64)


def build(dims: Dims, params: BigBirdParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; impls differ in the operator alone."""
    from ctxbench.implementations.bigbird import METHOD
    from ctxbench.implementations.bigbird.etc import build_etc

    if params.form == "etc":
        return build_etc(dims, params, impl).to(device, dtype)

    operator = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = [
        PreNormBlock(BigBirdAttention(dims, params, layer, operator, position), dims)
        for layer, position in enumerate(positions_of(dims, impl))
    ]
    return Stack(layers).to(device, dtype)
