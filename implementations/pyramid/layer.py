"""The pyramid: pre-norm layers at ever coarser resolutions, whose outputs are added to the finest one.

Level 0 holds the tokens, level l cells of ``pool^l`` tokens. Each level runs its layers, averages ``pool`` neighbours
into a cell, and projects to half the width; at the end every token reads the coarse outputs.

Causal form: only complete cells exist, cells attend causally to cells, and a token reads the last cell that is
complete with it. Nothing else is needed, since then cell c of level l depends on tokens before ``(c + 1) pool^l`` only.

B batch, T tokens, N cells of a level, H heads of a level, D head width, d_l width of level l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from ctxbench.implementations._shared.blocks import PreNormBlock, merge_heads, split_heads
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.pyramid.params import PyramidParams, level_dims
from ctxbench.method import Dims, Output, load


class Operators(NamedTuple):
    """What the impls differ in: attention within a level, from one to the level below, and the sum over levels.

    ``pooled(sources, pool, levels, ragged)``, where an impl has it, returns tensors ``[B, H, N, d_l]`` as they are and
    the means of their cells, ``[sources, B, H, n, d_l]``, in one pass each way.
    """

    attend: Callable[..., torch.Tensor]
    attend_below: Callable[..., torch.Tensor]
    fuse: Callable[..., torch.Tensor]
    pooled: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None


class Cache(NamedTuple):
    """Keys, rotated where the position encoding rotates, and values of a layer's complete cells: ``[B, H, N, D]``."""

    k: torch.Tensor
    v: torch.Tensor


class LevelState(NamedTuple):
    """What a level carries. How many cells are open follows from the caches' length.

    caches: one a layer. last: output of the last complete cell, ``[B, 1, d_l]``, zeros before the first; None at
    level 0, where nothing is read later. pending: sum of the outputs that the next level has not yet made a cell of,
    ``[B, 1, d_l]``, with pooled queries at the next level's width; None at the coarsest level.
    """

    caches: tuple[Cache, ...]
    last: torch.Tensor | None
    pending: torch.Tensor | None


class Attention(nn.Module):
    """Projections and cache around ``attend(q, k, v, causal, position, span) -> [B, H, N, D]``, cells of ``span``."""

    def __init__(self, dims: Dims, attend: Callable[..., torch.Tensor], position: Position, span: int):
        super().__init__()
        self.num_heads, self.causal = dims.num_heads, dims.causal
        self.position, self.span = position, span
        self.q = nn.Linear(dims.d_model, dims.d_model)
        self.k = nn.Linear(dims.d_model, dims.d_model)
        self.v = nn.Linear(dims.d_model, dims.d_model)
        self.o = nn.Linear(dims.d_model, dims.d_model)
        self.attend = attend

    def forward(self, x: torch.Tensor, state: Cache | None = None) -> Output:
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        # Cell c ends with token (c + 1) span - 1; only differences count, so c span will do.
        first = 0 if state is None else state.k.shape[2] * self.span
        q, k = self.position.both(q, k, first, self.span)
        if state is not None:
            state = Cache(torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2))
            k, v = state
        mixed = self.attend(q, k, v, self.causal, self.position, self.span) if x.shape[1] else v[:, :, :0]
        return Output(self.o(merge_heads(mixed)), state)


class PooledAttention(Attention):
    """``attend(q, k, v, start, pool, causal)`` from cells of ``span`` tokens to the ``pool`` times finer ones below."""

    def __init__(self, dims: Dims, attend: Callable[..., torch.Tensor], position: Position, span: int, pool: int):
        super().__init__(dims, attend, position, span)
        self.pool = pool

    def forward(self, x: torch.Tensor, state: Cache | None = None, below: torch.Tensor | None = None) -> Output:
        """``x: [B, N, d]`` new cells, ``below: [B, n, d]`` new cells of the level below, brought to the same width."""
        asked = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(project(below), self.num_heads) for project in (self.k, self.v))
        seen, step = 0 if state is None else state.k.shape[2], self.span // self.pool
        start = seen // self.pool
        # The last token of each cell.
        q = self.position.queries(asked, (start + 1) * self.span - 1, self.span)
        k = self.position.rotate(k, (seen + 1) * step - 1, step)
        if state is not None:
            state = Cache(torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2))
            k, v = state
        mixed = self.attend(q, k, v, start, self.pool, self.causal) if x.shape[1] else asked  # no row of v: it has some
        return Output(self.o(merge_heads(mixed)), state)


class PooledBlock(PreNormBlock):
    """A pre-norm layer whose keys and values come from the level below."""

    def forward(self, x: torch.Tensor, state: Cache | None = None, below: torch.Tensor | None = None) -> Output:
        y, state = self.mixer(self.norm_mixer(x), state, self.norm_mixer(below))
        x = x + y
        if self.ffn is not None and self.norm_ffn is not None:
            x = x + self.ffn(self.norm_ffn(x))
        return Output(x, state)


class Pyramid(nn.Module):
    """All levels; ``layers`` holds their layers in order, fine to coarse."""

    def __init__(self, dims: Dims, params: PyramidParams, operators: Operators, impl: str = ""):
        super().__init__()
        self.sizes = level_dims(dims, params)
        self.pool, self.causal, self.operators = params.pool, dims.causal, operators
        self.pooled_queries = params.pooled_queries
        self.layers = nn.ModuleList(
            _layer(size, operators, position, params, level, first=index == 0)
            for level, size in enumerate(self.sizes)
            for index, position in enumerate(positions_of(size, impl))
        )
        widths = [size.d_model for size in self.sizes]
        self.down = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.fusion = nn.Linear(sum(widths[1:]), dims.d_model) if len(widths) > 1 else None

    def forward(self, x: torch.Tensor, state: tuple[LevelState, ...] | None = None) -> Output:
        start = 0 if state is None else state[0].caches[0].k.shape[2]
        fine = cells = x
        below: torch.Tensor | None = None  # with pooled queries: new cells of the level below at this level's width
        coarse: list[torch.Tensor] = []
        after: list[LevelState] = []
        for level, layers in enumerate(self._layers_by_level()):
            before = None if state is None else state[level]
            new = (cells if below is None else below).shape[1]
            if before is not None and before.last is not None and new == 0:  # nothing new from here on up
                coarse.append(before.last)
                after.append(before)
                continue
            found, caches = _run(layers, cells, before, below)
            pending = None
            if level < len(self.down):
                held = start // self.pool**level % self.pool
                if self.pooled_queries:
                    below, cells, pending = self._coarsen(self.down[level](found), before, held)
                else:
                    found, cells, pending = self._coarsen(found, before, held)
                    cells = self.down[level](cells)
            if level == 0:
                fine = found
            else:
                coarse.append(self._readable(found, before))
            del found
            if before is not None:
                last = coarse[-1][:, -1:].clone() if level else None  # a view would keep the whole level alive
                after.append(LevelState(caches, last, pending))
        del cells, below  # else they would live through the sum
        if self.fusion is not None:
            weight, bias = self.fusion.weight, self.fusion.bias
            fine = self.operators.fuse(fine, coarse, start, self.pool, self.causal, weight, bias)
        return Output(fine, None if state is None else tuple(after))

    def init_state(self, batch_size: int) -> tuple[LevelState, ...]:
        """State before the first token: no cells, no sums."""
        return self._state(batch_size, 0, torch.zeros)

    def state_at(self, batch_size: int, context: int) -> tuple[LevelState, ...]:
        """State shaped as after ``context`` tokens, contents random."""
        return self._state(batch_size, context, torch.randn)

    def _layers_by_level(self) -> Iterator[list[nn.Module]]:
        remaining = iter(self.layers)
        for size in self.sizes:
            yield list(islice(remaining, size.num_layers))

    def _readable(self, cells: torch.Tensor, before: LevelState | None) -> torch.Tensor:
        """Cells that tokens of this call may read; the causal form puts the last earlier cell, or zeros, in front."""
        if not self.causal:
            return cells
        if before is None or before.last is None:
            return pad(cells, (0, 0, 1, 0))
        return torch.cat((before.last, cells), dim=1)

    def _coarsen(
        self, cells: torch.Tensor, before: LevelState | None, held: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The cells, means of ``pool`` neighbours, and the sum of the cells left over, ``[B, 1, d_l]``.

        ``held`` cells of earlier calls are open; their sum stands for the first of them. The bidirectional form
        averages the left-over cells too, over as many as there are.
        """
        if before is None and self.operators.pooled is not None:
            (own,), (means,) = self.operators.pooled([cells.unsqueeze(1)], self.pool, 1, not self.causal)
            return own.squeeze(1), means.flatten(0, 2), None
        new = cells
        if held and before is not None and before.pending is not None:
            cells = torch.cat((pad(before.pending, (0, 0, 0, held - 1)), cells), dim=1)
        whole, left_over = divmod(cells.shape[1], self.pool)
        complete, rest = cells.split((whole * self.pool, left_over), dim=1)
        pooled = complete.unflatten(1, (whole, self.pool)).mean(dim=2)
        if left_over and not self.causal:
            pooled = torch.cat((pooled, rest.mean(dim=1, keepdim=True)), dim=1)
        return new, pooled, rest.sum(dim=1, keepdim=True)

    def _state(self, batch_size: int, context: int, fill: Callable[..., torch.Tensor]) -> tuple[LevelState, ...]:
        weight = self.layers[0].mixer.k.weight
        like = {"device": weight.device, "dtype": weight.dtype}
        levels = []
        for level, size in enumerate(self.sizes):
            counts = [context // self.pool**level] * size.num_layers
            if self.pooled_queries and level:
                counts[0] = context // self.pool ** (level - 1)
            shapes = [(batch_size, size.num_heads, count, size.head_dim) for count in counts]
            caches = tuple(Cache(fill(shape, **like), fill(shape, **like)) for shape in shapes)
            last = fill((batch_size, 1, size.d_model), **like) if level else None
            pending = None
            if level < len(self.down):
                summed = self.sizes[level + 1] if self.pooled_queries else size
                pending = fill((batch_size, 1, summed.d_model), **like)
            levels.append(LevelState(caches, last, pending))
        return tuple(levels)


def _layer(
    size: Dims, operators: Operators, position: Position, params: PyramidParams, level: int, first: bool
) -> nn.Module:
    span = params.pool**level
    if level and first and params.pooled_queries:
        return PooledBlock(PooledAttention(size, operators.attend_below, position, span, params.pool), size)
    return PreNormBlock(Attention(size, operators.attend, position, span), size)


def _run(
    layers: list[nn.Module], x: torch.Tensor, before: LevelState | None, below: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[Cache, ...]]:
    """Layers of one level in order, with their caches where there is a state."""
    caches = []
    for index, layer in enumerate(layers):
        cache = None if before is None else before.caches[index]
        if index == 0 and below is not None:
            x, cache = layer(x, cache, below)
        elif cache is None or x.shape[1]:
            x, cache = layer(x, cache)
        caches.append(cache)
    return x, tuple(caches)


def build(dims: Dims, params: PyramidParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The pyramid around the impl's operators; ``as_written`` is a module of its own."""
    from ctxbench.implementations.pyramid import METHOD

    run = load(METHOD.impl(impl).run)
    module: nn.Module = Pyramid(dims, params, run, impl) if isinstance(run, Operators) else run(dims, params)
    return module.to(device, dtype)
