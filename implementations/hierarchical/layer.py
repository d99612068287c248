"""Hierarchical attention in a pre-norm layer: the causal forms with their state, and the repaired sketch.

Causal: keys and values of tokens are averaged into cells of ``pool`` tokens, these into cells of ``pool^2``, and so on.
A token sees a window of tokens and, of every coarse scale, cells that are complete with it.
Seed: every scale attends among its own cells; what they find is brought back to the tokens and added up.

B batch, H heads, T tokens, D head width, n cells of a scale, s tokens of a cell; d_model = H * D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.positions import Bias, Position, Rotary
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.hierarchical.params import HierarchicalParams
from ctxbench.method import Dims, Output, load


class Operators(NamedTuple):
    """What the impls differ in: attention of the causal forms; attention and fusion of the seed form.

    ``pooled(sources, pool, levels, ragged)``, where an impl has it, returns tensors ``[B, H, T, D]`` as they are and
    the means of their cells at each coarse scale, ``[sources, B, H, n, D]``, all scales at once.
    """

    attend: Callable[..., torch.Tensor]
    mix: Callable[..., torch.Tensor]
    fuse: Callable[..., torch.Tensor]
    pooled: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None


class State(NamedTuple):
    """What later tokens need.

    levels: of each scale keys and values ``[2, B, H, n, D]`` of the cells that a later token can see; the keys rotated
        where the position encoding rotates, which sums of open cells never are.
    open: of each coarse scale the sum ``[2, B, H, 1, D]`` of the finer cells that do not fill a cell of it yet.
    tokens: how many there have been.
    """

    levels: tuple[torch.Tensor, ...]
    open: tuple[torch.Tensor, ...]
    tokens: int


class MultiScaleAttention(nn.Module):
    """Projections, cells and state around ``attend(q, levels, scales, start, line) -> [B, H, T, D]``."""

    def __init__(self, dims: Dims, params: HierarchicalParams, operators: Operators, position: Position):
        super().__init__()
        self.num_heads, self.head_dim, self.position = dims.num_heads, dims.head_dim, position
        self.pool, self.scales = params.pool, params.scales
        self.q, self.k, self.v, self.o = (nn.Linear(dims.d_model, dims.d_model) for _ in range(4))
        self.attend, self.pooled = operators.attend, operators.pooled

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        # Every scale reads the queries anew, so they are rotated once, whatever the impl.
        q = self.position.rotate(split_heads(self.q(x), self.num_heads), 0 if state is None else state.tokens)
        kv: Any = [split_heads(project(x), self.num_heads) for project in (self.k, self.v)]
        rests: list[Any] = []
        if state is None and self.pooled is not None:
            levels = self._levels_at_once(kv)
        else:
            kv = torch.stack(kv)
            levels, rests = self._levels(kv, state)
        del kv
        start = 0 if state is None else state.tokens
        mixed = self.attend(q, levels, self.scales, start, self._line(start + x.shape[1], x))
        if state is not None:
            state = self._after(levels, rests, state.tokens + x.shape[1])
        del q, levels, rests  # else they would live through the output projection
        return Output(self.o(merge_heads(mixed)), state)

    def _levels_at_once(self, kv: list[torch.Tensor]) -> list[Any]:
        """Of each scale keys and values ``[B, H, n, D]`` of its complete cells, of a whole sequence."""
        assert self.pooled is not None
        pairs: list[Any] = [kv]
        if len(self.scales) > 1:
            fine, coarse = self.pooled(kv, self.pool, len(self.scales) - 1, False)
            pairs = [fine, *coarse]
        return [self._placed(tuple(cells), level, None) for level, cells in enumerate(pairs)]

    def _levels(self, kv: torch.Tensor, state: State | None) -> tuple[list[torch.Tensor], list[Any]]:
        """Of each scale the remembered cells and the new ones, and of each coarse scale the sum of its open cell."""
        levels, rests, new = [], [], kv
        for level in range(len(self.scales)):
            if level:
                held = 0 if state is None else state.tokens // self.scales[level - 1].span % self.pool
                new, rest = self._coarsen(new, held, None if state is None else state.open[level - 1])
                rests.append(rest)
            placed = self._placed(new, level, state)
            if state is None:
                levels.append(placed)
            else:
                old = state.levels[level]
                levels.append(torch.cat((old, placed), dim=3) if new.shape[3] else old)
        return levels, rests

    def _line(self, tokens: int, like: torch.Tensor) -> torch.Tensor | None:
        """Biases by tokens from a cell's last one to a query, ``[H, tokens]``."""
        if not isinstance(self.position, Bias):
            return None
        return self.position.bias(-torch.arange(tokens, device=like.device), like.dtype)

    def _placed(self, cells: Any, level: int, state: State | None) -> Any:
        """Keys of new cells rotated by their last tokens; means of rotated keys would mix phases.

        Keys and values in one tensor or as a pair; what comes in is what comes out.
        """
        if not isinstance(self.position, Rotary):
            return cells
        span = self.scales[level].span
        first = 0 if state is None else state.tokens // span
        placed = self.position.rotate(cells[0], (first + 1) * span - 1, span), cells[1]
        return placed if isinstance(cells, tuple) else torch.stack(placed)

    def _coarsen(
        self, cells: torch.Tensor, held: int, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means of ``pool`` neighbours, and the sum of what is left over where there is a state to keep it in.

        ``held`` cells of earlier calls are open; their sum ``before`` stands for the first of them.
        """
        if before is not None and held:
            cells = torch.cat((pad(before, (0, 0, 0, held - 1)), cells), dim=3)
        whole = cells.shape[3] // self.pool
        means = cells[:, :, :, : whole * self.pool].unflatten(3, (whole, self.pool)).mean(dim=4)
        return means, None if before is None else cells[:, :, :, whole * self.pool :].sum(dim=3, keepdim=True)

    def _after(self, levels: list[torch.Tensor], rests: list[torch.Tensor], tokens: int) -> State:
        kept = []
        for cells, scale in zip(levels, self.scales, strict=True):
            surplus = cells.shape[3] - scale.keeps(tokens)
            kept.append(cells[:, :, :, surplus:].clone() if surplus else cells)
        return State(tuple(kept), tuple(rests), tokens)

    def init_state(self, batch_size: int) -> State:
        """State before the first token."""
        return self._state(batch_size, 0, torch.zeros)

    def state_at(self, batch_size: int, context: int) -> State:
        """State shaped as after ``context`` tokens, contents random."""
        return self._state(batch_size, context, torch.randn)

    def _state(self, batch_size: int, context: int, fill: Callable[..., torch.Tensor]) -> State:
        def cells(count: int) -> torch.Tensor:
            weight, shape = self.k.weight, (2, batch_size, self.num_heads, count, self.head_dim)
            return fill(shape, device=weight.device, dtype=weight.dtype)

        levels = tuple(cells(scale.keeps(context)) for scale in self.scales)
        return State(levels, tuple(cells(1) for _ in self.scales[1:]), context)


class Branch(nn.Module):
    """Bidirectional attention among the cells of one scale, ``[B, n, d] -> [B, n, d]``."""

    def __init__(self, dims: Dims, operators: Operators):
        super().__init__()
        self.num_heads = dims.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dims.d_model, dims.d_model) for _ in range(4))
        self.mix = operators.mix

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(project(cells), self.num_heads) for project in (self.q, self.k, self.v))
        mixed = self.mix(q, k, v)
        del q, k, v  # else they would live through the output projection
        return self.o(merge_heads(mixed))


class Upsampling(nn.Module):
    """Weights that bring a cell back to its ``span`` tokens, one matrix a place: a transposed convolution."""

    def __init__(self, d_model: int, span: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model, d_model, span).uniform_(-1, 1) * d_model**-0.5)
        self.bias = nn.Parameter(torch.zeros(d_model))


class BranchedAttention(nn.Module):
    """The seed form, repaired: one branch a scale, and the fusion of all of them."""

    def __init__(self, dims: Dims, params: HierarchicalParams, operators: Operators):
        super().__init__()
        self.spans, self.fuse, self.pooled = params.spans, operators.fuse, operators.pooled
        self.branches = nn.ModuleList(Branch(dims, operators) for _ in self.spans)
        self.up = nn.ModuleList(Upsampling(dims.d_model, span) for span in self.spans[1:])
        self.fusion = nn.Linear(dims.d_model * len(self.spans), dims.d_model)

    def forward(self, x: torch.Tensor, state: None = None) -> Output:
        if self.pooled is None or len(self.spans) == 1:
            found = [branch(averaged(x, span)) for branch, span in zip(self.branches, self.spans, strict=True)]
        else:
            (fine,), coarse = self.pooled([x[:, None]], self.spans[1], len(self.spans) - 1, True)
            cells = fine.squeeze(1), *(means.flatten(0, 2) for means in coarse)
            found = [branch(own) for branch, own in zip(self.branches, cells, strict=True)]
        kernels, biases = [up.weight for up in self.up], [up.bias for up in self.up]
        return Output(self.fuse(found, kernels, biases, self.fusion.weight, self.fusion.bias))


def averaged(x: torch.Tensor, span: int) -> torch.Tensor:
    """Means of ``span`` neighbours ``[B, T, d] -> [B, ceil(T / span), d]``; the last may have fewer."""
    if span == 1:
        return x
    whole, left_over = divmod(x.shape[1], span)
    means = x[:, : whole * span].unflatten(1, (whole, span)).mean(dim=2)
    return torch.cat((means, x[:, whole * span :].mean(dim=1, keepdim=True)), dim=1) if left_over else means


def build(dims: Dims, params: HierarchicalParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; ``as_written`` is a mixer of its own, whatever the form."""
    from ctxbench.implementations.hierarchical import METHOD

    run = load(METHOD.impl(impl).run)

    def mixer(position: Position) -> nn.Module:
        if not isinstance(run, Operators):
            return run(dims, params.spans)
        if params.form == "seed":
            return BranchedAttention(dims, params, run)
        return MultiScaleAttention(dims, params, run, position)

    layers: list[nn.Module] = [PreNormBlock(mixer(position), dims) for position in positions_of(dims, impl)]
    return Stack(layers).to(device, dtype)
