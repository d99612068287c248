"""Blocks of tokens behind a state that carries what earlier blocks were about, in a pre-norm stack.

B batch, T tokens, b block_len, k num_states, H heads, D head width; d_model = H * D. Equations in README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, merge_heads, split_heads
from ctxbench.implementations._shared.graph import replaying
from ctxbench.implementations._shared.joined import Joined
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.block_state.params import BlockStateParams
from ctxbench.method import Dims, Output, load


class Cache(NamedTuple):
    """Keys and values of a layer's block so far, states first: ``[B, H, rows, D]``; no rows before its first token."""

    k: torch.Tensor
    v: torch.Tensor


class State(NamedTuple):
    """Between two tokens: one entry of ``vectors`` and ``pooled`` in the variant ``bottom``, one a layer in ``layer``.

    ``vectors: [B, k, d_model]``; ``pooled: [B, d_model]``, sum of the block's outputs or the last of them, at least in
    fp32; ``caches``: one a layer; ``tokens``: how many so far.
    """

    vectors: tuple[torch.Tensor, ...]
    pooled: tuple[torch.Tensor, ...]
    caches: tuple[Cache, ...]
    tokens: int


class BlockAttention(nn.Module):
    """Projections and positions around ``operator(q, k, v, position) -> [B, H, rows, D]``, causal."""

    def __init__(self, dims: Dims, operator: Any, position: Position):
        super().__init__()
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dims.d_model, dims.d_model) for _ in range(4))
        self.operator, self.position = operator, position

    def forward(self, x: torch.Tensor, state: Cache | None = None) -> Output:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        past = 0 if state is None else state.k.shape[2]
        q, k = self.position.both(q, k, past)
        if state is not None:
            state = Cache(torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2))
            k, v = state
        mixed = self.operator(q, k, v, self.position)
        del q, k, v  # else they would live through the output projection
        return Output(self.o(merge_heads(mixed)), state)


class Update(nn.Module):
    """The next state of the last one, ``[B, k, d_model]``, and of the pooled block, ``[B, d_model]``."""

    def __init__(self, dims: Dims, params: BlockStateParams):
        super().__init__()
        d_model = dims.d_model
        self.initial = nn.Parameter(0.02 * torch.randn(params.num_states, d_model))
        self.gru = nn.GRUCell(d_model, d_model) if params.update == "gru" else None
        self.up = nn.Linear(2 * d_model, d_model) if params.update == "mlp" else None
        self.down = nn.Linear(d_model, d_model) if params.update == "mlp" else None

    def forward(self, vectors: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        pooled = pooled[:, None].expand_as(vectors)
        if self.gru is not None:
            return self.gru(pooled.flatten(0, 1), vectors.flatten(0, 1)).view_as(vectors)
        assert self.up is not None
        assert self.down is not None
        return vectors + self.down(nn.functional.gelu(self.up(torch.cat((vectors, pooled), dim=2))))


class BlockStateStack(nn.Module):
    """The layers over one block after the other: the recurrence is real, a block needs the state before it."""

    def __init__(self, dims: Dims, params: BlockStateParams, operator: Any, impl: str = ""):
        super().__init__()
        self.params = params
        self.layers = nn.ModuleList(
            [PreNormBlock(BlockAttention(dims, operator, position), dims) for position in positions_of(dims, impl)]
        )
        states = dims.num_layers if params.variant == "layer" else 1
        self.updates = nn.ModuleList([Update(dims, params) for _ in range(states)])

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        b, carried = self.params.block_len, state is not None
        if state is None:
            state = self.init_state(x.shape[0])
        outputs, end = Joined(x.shape[1]), state.tokens + x.shape[1]
        while state.tokens < end:
            piece = x[:, : b - state.tokens % b]
            x = x[:, piece.shape[1] :]
            y, state = self.advance(piece, state, follows=carried or state.tokens + piece.shape[1] < end)
            outputs.add(y)
            del piece, y  # else they would live through the next block
        return Output(outputs.result(), state if carried else None)

    def advance(self, x: torch.Tensor, state: State, follows: bool) -> tuple[torch.Tensor, State]:
        """Consecutive tokens of one block; the state after them where anything ``follows`` that reads it."""
        begins = state.tokens % self.params.block_len == 0
        tokens = state.tokens + x.shape[1]
        ends = tokens % self.params.block_len == 0
        alone = begins and (ends or not follows)  # the block in one piece: no cache comes in or goes out
        count, caches, made = x.shape[1], [], []
        for index, layer in enumerate(self.layers):
            if begins and index < len(state.vectors):
                x = torch.cat((state.vectors[index], x), dim=1)
            x, cache = layer(x, None if alone else state.caches[index])
            caches.append(cache)
            if index >= len(self.layers) - len(state.vectors):  # every layer, or the last one
                x = x[:, x.shape[1] - count :]
                made.append(x)
        if not follows:
            return x, state._replace(tokens=tokens)
        pooled = tuple(self.pool(y, before) for y, before in zip(made, state.pooled, strict=True))
        if not ends:
            return x, State(state.vectors, pooled, tuple(caches), tokens)
        size = self.params.block_len if self.params.pool == "mean" else 1
        triples = zip(self.updates, state.vectors, pooled, strict=True)
        vectors = tuple(update(old, (new / size).to(old.dtype)) for update, old, new in triples)
        return x, State(vectors, *self._empty(x.shape[0], 0, torch.zeros), tokens)

    def pool(self, y: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Add the outputs ``y: [B, n, d_model]`` to what stands for the block."""
        if self.params.pool == "last":
            return y[:, -1].to(before.dtype, copy=True)  # a view would keep all outputs alive
        return before + y.sum(dim=1, dtype=before.dtype)

    def init_state(self, batch_size: int) -> State:
        """The learned initial states, one copy a batch row."""
        vectors = tuple(update.initial.expand(batch_size, -1, -1).clone() for update in self.updates)
        return State(vectors, *self._empty(batch_size, 0, torch.zeros), 0)

    def state_at(self, batch_size: int, context: int) -> State:
        """Random contents in the shapes that follow ``context`` tokens."""
        vectors = tuple(torch.randn_like(update.initial.expand(batch_size, -1, -1)) for update in self.updates)
        fill = context % self.params.block_len
        rows = fill + self.params.num_states if fill else 0
        return State(vectors, *self._empty(batch_size, rows, torch.randn), context)

    def _empty(self, batch_size: int, rows: int, make: Any) -> tuple[tuple[torch.Tensor, ...], tuple[Cache, ...]]:
        """``pooled`` and ``caches`` of a block with so many rows, made by ``make``."""
        mixer: BlockAttention = self.layers[0].mixer  # type: ignore[assignment]
        weight, shape = mixer.k.weight, (batch_size, mixer.num_heads, rows, mixer.head_dim)
        where = {"device": weight.device}
        wide = torch.promote_types(weight.dtype, torch.float32)
        pooled = tuple(make(batch_size, weight.shape[1], dtype=wide, **where) for _ in self.updates)
        caches = (Cache(*(make(shape, dtype=weight.dtype, **where) for _ in range(2))) for _ in self.layers)
        return pooled, tuple(caches)


def build(dims: Dims, params: BlockStateParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The stack; impls differ in the operator, ``graph`` and diagonal ones in the order of blocks and layers."""
    from ctxbench.implementations.block_state import METHOD

    stack: Any = replaying(BlockStateStack, params.block_len) if impl == "graph" else BlockStateStack
    if impl in ("diagonal", "diagonal_triton"):
        stack = load(f"{__package__}.diagonal:DiagonalStack")
    return stack(dims, params, load(METHOD.impl(impl).run), impl).to(device, dtype)
