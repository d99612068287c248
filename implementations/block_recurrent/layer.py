"""A sliding-window layer whose tokens also read states, and states that read its tokens (Hutchins et al. 2022).

B batch, H heads, T tokens, D head width, W window, R num_states; d_model = H * D. Equations in README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from ctxbench.implementations._shared.biased_window import Pieces, WindowAttention, between, last
from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.graph import replaying
from ctxbench.implementations._shared.positions import Position, positions_for
from ctxbench.implementations._shared.products import buffers_kept
from ctxbench.implementations.block_recurrent.params import BlockRecurrentParams, recurrent_layer
from ctxbench.method import Dims, Output, load


class Slots(NamedTuple):
    """State vectors ``[B, R, d_model]`` and their keys and values ``[B, H, R, D]``, which tokens and states share.

    Keys and values are carried along, so that a token that completes no window projects no state.
    """

    vectors: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class State(NamedTuple):
    """What the next token needs, detached: ``k, v: [B, H, min(t, W + t mod W), D]`` and the number t of tokens."""

    slots: Slots
    k: torch.Tensor
    v: torch.Tensor
    tokens: int


class RecurrentAttention(WindowAttention):
    """Attention in two directions around ``attend(q, k, v) -> [B, H, n, D]``, which has no mask."""

    def __init__(self, dims: Dims, params: BlockRecurrentParams, position: Position, operator: Any, attend: Any):
        scale = dims.head_dim**0.5  # what queries and keys of unit variance have
        super().__init__(dims, params.window, position, operator, scale)
        d_model = dims.d_model
        self.attend = attend
        self.o = nn.Linear(2 * d_model, d_model, bias=False)
        self.read_q = nn.Linear(d_model, d_model, bias=False)
        self.norm_state = nn.LayerNorm(d_model)
        self.initial = nn.Parameter(0.1 * torch.randn(params.num_states, d_model))
        self.identity = nn.Parameter(torch.randn(params.num_states, d_model))
        self.state_k, self.state_v, self.state_q, self.write_q = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.state_o = nn.Linear(2 * d_model, d_model)
        self.read_scale, self.state_scale, self.write_scale = (
            nn.Parameter(torch.full((dims.num_heads,), scale)) for _ in range(3)
        )
        self.keep = nn.Parameter(0.1 * torch.randn(d_model)) if params.gate == "fixed" else None
        self.forget = nn.Linear(d_model, d_model) if params.gate == "lstm" else None
        self.take = nn.Linear(d_model, d_model) if params.gate == "lstm" else None

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:  # type: ignore[override]
        W, T = self.window, x.shape[1]
        q, *own = self.project(x)
        if state is None:
            slots, known, tokens = self.first_slots(x.shape[0]), 0, 0
        else:
            slots, known, tokens = state.slots, state.k.shape[2], state.tokens
        pieces = self.pieces(state, *own)
        del own  # else they would be there twice where they are joined
        local = self.mixed(q, pieces)
        del q  # else it would live through the recurrence
        query, read, end = self.scaled(self.read_q(x), self.read_scale), [], tokens + T
        with buffers_kept():
            for begin in range(-(tokens % W), T, W):
                first, stop = max(begin, 0), min(begin + W, T)
                read.append(self.attend(query[:, :, first:stop], slots.k, slots.v))
                tokens += stop - first
                if tokens % W == 0 and (state is not None or tokens < end):  # else nothing would read what is written
                    slots = self.update(slots, between(pieces, known + stop - 2 * W, known + stop))
        mixed = torch.cat((merge_heads(local), merge_heads(torch.cat(read, dim=2))), dim=2)
        del local, query, read
        if state is not None:
            detached = Slots(*(a.detach() for a in slots))
            state = State(detached, *last(pieces, W + tokens % W), tokens)  # type: ignore[misc]
        del pieces
        return Output(self.o(mixed), state)

    def scaled(self, rows: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors of each head, ``[B, n, d_model] -> [B, H, n, D]``; of queries, times the head's scale."""
        unit = normalize(split_heads(rows, self.num_heads), dim=3)
        return unit if scale is None else unit * scale[:, None, None]

    def named(self, vectors: torch.Tensor) -> torch.Tensor:
        """States as they are projected: normed, then told apart by their learned identities."""
        return self.norm_state(vectors) + self.identity

    def open(self, vectors: torch.Tensor) -> Slots:
        """Add the keys and values of states."""
        named = self.named(vectors)
        return Slots(vectors, self.scaled(self.state_k(named)), split_heads(self.state_v(named), self.num_heads))

    def update(self, slots: Slots, near: Pieces) -> Slots:
        """States after a window; ``near``: keys and values of that window and of the one before it."""
        named = self.named(slots.vectors)
        own = self.attend(self.scaled(self.state_q(named), self.state_scale), slots.k, slots.v)
        seen = self.attend(self.scaled(self.write_q(named), self.write_scale), *near[0], *near[1:])
        new = self.state_o(torch.cat((merge_heads(own), merge_heads(seen)), dim=2))
        del named, own, seen
        if self.keep is not None:
            return self.open(torch.lerp(new, slots.vectors, torch.sigmoid(self.keep)))
        assert self.forget is not None
        assert self.take is not None
        forget, take = torch.sigmoid(self.forget(new) + 1), torch.sigmoid(self.take(new) - 1)
        return self.open(forget * slots.vectors + take * new)

    def first_slots(self, batch_size: int) -> Slots:
        """The learned initial states, projected once for all rows."""
        return Slots(*(a.expand(batch_size, *a.shape[1:]) for a in self.open(self.initial[None])))

    def init_state(self, batch_size: int) -> State:
        slots = Slots(*(a.detach().clone() for a in self.first_slots(batch_size)))
        k, v = self.random_rows(batch_size, 0, 2)
        return State(slots, k, v, 0)

    def state_at(self, batch_size: int, context: int) -> State:
        vectors = torch.randn_like(self.initial.expand(batch_size, -1, -1))
        state_k, state_v = self.random_rows(batch_size, len(self.initial), 2)
        k, v = self.random_rows(batch_size, min(context, self.window + context % self.window), 2)
        return State(Slots(vectors, state_k, state_v), k, v, context)


def build(dims: Dims, params: BlockRecurrentParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """One of ``num_layers`` layers is recurrent; impls differ in two operators, ``graph`` in the loop over windows."""
    from ctxbench.implementations.block_recurrent import METHOD

    operator, attend = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = []
    for index, position in enumerate(positions_for(dims)):
        if index == recurrent_layer(dims.num_layers):
            layers.append(PreNormBlock(RecurrentAttention(dims, params, position, operator, attend), dims))
        else:
            layers.append(
                PreNormBlock(WindowAttention(dims, params.window, position, operator, dims.head_dim**0.5), dims)
            )
    stack = replaying(Stack, params.window) if impl == "graph" else Stack
    return stack(layers).to(device, dtype)
