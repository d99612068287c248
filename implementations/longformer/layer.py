"""Longformer self-attention in a pre-norm layer, with a bounded causal state (Beltagy et al. 2020, section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.method import Dims, Output, load


class State(NamedTuple):
    """What later tokens need: the prefix and the last ``Pattern.reach`` tokens, as if nothing had been between.

    All keys are kept rotated, where the position encoding rotates.

    ``k, v``: for each group of heads ``[B, heads, kept, D]``, prefix first. ``scattered_k, scattered_v: [B, H, x, D]``
    hold the scattered globals met so far. ``global_k, global_v: [B, H, c, D]`` hold all c tokens so far in the global
    projections; they are empty once the last global row is final. Without such projections ``k, v`` hold all tokens
    until then.
    """

    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    scattered_k: torch.Tensor
    scattered_v: torch.Tensor
    global_k: torch.Tensor
    global_v: torch.Tensor
    tokens: int


class LongformerAttention(nn.Module):
    """Projections and state around ``operator(q, k, v, rows, scattered, pattern, line) -> [B, H, T, D]``."""

    def __init__(self, dims: Dims, params: LongformerParams, operator: Any = None, position: Position | None = None):
        super().__init__()
        self.position = Position() if position is None else position
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.groups = params.groups(dims)
        self.pattern = self.groups[-1][1]
        self.separate = params.separate_global and self.pattern.end_of_globals > 0
        width = dims.d_model
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        if self.separate:
            self.global_q, self.global_k, self.global_v = (nn.Linear(width, width) for _ in range(3))
        self.operator = operator

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        T, before = x.shape[1], 0 if state is None else state.tokens
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        q, k = self.position.both(q, k, before)
        scattered = self._scattered(k, v, before, state)
        keys, values = (self._join(new, state, name) for new, name in ((k, "k"), (v, "v")))
        del k, v
        rows = self._global_rows(x, q, keys, values, before, state)
        mixed = []
        for (heads, pattern), key, value, own in zip(self.groups, keys, values, rows, strict=True):
            dropped = before + T - key.shape[2]
            places = tuple(position - dropped for position in scattered.at)
            theirs = Scattered(scattered.k[:, heads], scattered.v[:, heads], places)
            line = self._line(key, heads, pattern)
            mixed.append(self.operator(q[:, heads], key, value, own, theirs, pattern, line))
        if state is not None:
            state = self._after(keys, values, scattered, rows, before + T)
        # Else they would live through the output projection.
        del q, keys, values, rows, scattered, key, value, own, theirs, line
        return Output(self.o(merge_heads(mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1))), state)

    def _line(self, key: torch.Tensor, heads: slice, pattern: Pattern) -> torch.Tensor | None:
        """Biases of one group of heads for the band's distances: keys ahead, the own one, then further back."""
        if not isinstance(self.position, Bias):
            return None
        S = key.shape[2]
        back = torch.arange(-min(pattern.right, S - 1), min(pattern.left, S - 1) + 1, device=key.device)
        return self.position.bias(-back * pattern.dilation, key.dtype)[heads]

    def _join(self, new: torch.Tensor, state: State | None, name: str) -> tuple[torch.Tensor, ...]:
        """Keys or values of each group of heads, those of the state first."""
        parts = tuple(new[:, heads] for heads, _ in self.groups)
        if state is None:
            return parts
        return tuple(torch.cat(pair, dim=2) for pair in zip(getattr(state, name), parts, strict=True))

    def _scattered(self, k: torch.Tensor, v: torch.Tensor, before: int, state: State | None) -> Scattered:
        """Scattered globals of all heads, with their positions."""
        end = before + k.shape[2]
        at = self.pattern.scattered[: self.pattern.met(end)]
        here = [position - before for position in at if position >= before]
        k, v = k[:, :, here], v[:, :, here]
        if state is not None:
            k, v = torch.cat((state.scattered_k, k), dim=2), torch.cat((state.scattered_v, v), dim=2)
        return Scattered(k, v, at)

    def _global_rows(
        self, x: torch.Tensor, q: torch.Tensor, k: tuple[torch.Tensor, ...], v: tuple[torch.Tensor, ...],
        before: int, state: State | None,
    ) -> list[GlobalRows]:  # fmt: skip
        """Global rows of each group of heads. Causal ones see no token beyond the last of them."""
        pattern, end = self.pattern, before + x.shape[1]
        at = (*range(before, min(pattern.num_global, end)), *(p for p in pattern.scattered if before <= p < end))
        here = slice(len(at)) if len(at) == max(0, min(pattern.num_global, end) - before) else [p - before for p in at]
        seen = min(end, pattern.end_of_globals) if pattern.causal else end
        if not self.separate:
            parts = zip(self.groups, k, v, strict=True)
            return [
                GlobalRows(q[:, heads][:, :, here], a[:, :, :seen], b[:, :, :seen], at) for (heads, _), a, b in parts
            ]
        own_q = self.position.queries(split_heads(self.global_q(x[:, here]), self.num_heads), at)
        keys = x[:, : max(0, seen - before)]
        own_k, own_v = (split_heads(project(keys), self.num_heads) for project in (self.global_k, self.global_v))
        own_k = self.position.rotate(own_k, before)
        if state is not None:
            own_k, own_v = torch.cat((state.global_k, own_k), dim=2), torch.cat((state.global_v, own_v), dim=2)
        return [GlobalRows(own_q[:, heads], own_k[:, heads], own_v[:, heads], at) for heads, _ in self.groups]

    def _after(
        self, k: tuple[torch.Tensor, ...], v: tuple[torch.Tensor, ...], scattered: Scattered,
        rows: list[GlobalRows], tokens: int,
    ) -> State:  # fmt: skip
        pending = tokens < self.pattern.end_of_globals
        if self.separate or not pending:
            k, v = (tuple(_recent(a, p) for a, (_, p) in zip(pair, self.groups, strict=True)) for pair in (k, v))
        nothing = scattered.k.new_empty(scattered.k.shape[0], self.num_heads, 0, self.head_dim)
        history_k, history_v = nothing, nothing
        if self.separate and pending:
            history_k, history_v = (torch.cat(parts, dim=1) for parts in ([a.k for a in rows], [a.v for a in rows]))
        return State(k, v, scattered.k, scattered.v, history_k, history_v, tokens)

    def init_state(self, batch_size: int) -> State:
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size: int, context: int) -> State:
        def some(heads: int, tokens: int) -> torch.Tensor:
            weight = self.k.weight
            return torch.randn(batch_size, heads, tokens, self.head_dim, device=weight.device, dtype=weight.dtype)

        pending = context < self.pattern.end_of_globals
        everything = pending and not self.separate
        kept = [
            (heads.stop - (heads.start or 0), context if everything else pattern.keeps(context))
            for heads, pattern in self.groups
        ]
        k, v = (tuple(some(*sizes) for sizes in kept) for _ in range(2))
        met, history = self.pattern.met(context), context if self.separate and pending else 0
        rest = [some(self.num_heads, length) for length in (met, met, history, history)]
        return State(k, v, rest[0], rest[1], rest[2], rest[3], context)


def _recent(a: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Of keys or values ``[B, H, S, D]`` the prefix and the last ``reach``."""
    S = a.shape[2]
    if pattern.keeps(S) == S:
        return a
    return torch.cat((a[:, :, : pattern.num_global], a[:, :, S - pattern.reach :]), dim=2)


def build(dims: Dims, params: LongformerParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; ``as_written`` replaces the mixer, all other impls its operator."""
    from ctxbench.implementations.longformer import METHOD

    seam = load(METHOD.impl(impl).run)

    def mixer(position: Position) -> nn.Module:
        return seam(dims, params) if impl == "as_written" else LongformerAttention(dims, params, seam, position)

    layers: list[nn.Module] = [PreNormBlock(mixer(position), dims) for position in positions_of(dims, impl)]
    return Stack(layers).to(device, dtype)
