"""Local and routed heads in a pre-norm layer (Roy et al. 2020, section 4), shared by all implementations.

B batch, T tokens of this call, S tokens with a key, H heads, D head width, K clusters, w tokens a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, split_heads
from ctxbench.implementations._shared.positions import Position, of_heads
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.routing.params import RoutingParams
from ctxbench.implementations.routing.routing import Centroids, assigned, normalised, taken
from ctxbench.method import Dims, Output, load


class State(NamedTuple):
    """What later tokens can see; routed heads keep all tokens, local heads those of two blocks.

    Attributes:
        local_k, local_v: ``[B, H, n, D]``; the first is the first of a block.
        k, v: routed, ``[B, H, S, D]``, keys normalised.
        ids: cluster of each routed key, ``[B, H, S]`` int32.
        tokens: how many there were.

    All keys are kept rotated, where the position encoding rotates.
    """

    local_k: torch.Tensor
    local_v: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ids: torch.Tensor
    tokens: int


class Rules(NamedTuple):
    """What a query sees. ``earlier``: itself and earlier tokens only, of its cluster as of its blocks."""

    num_clusters: int
    earlier: bool
    exclude_self: bool


class Operators(NamedTuple):
    """The seam between implementations. ``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, results ``[B, H, T, D]``.

    Attributes:
        local: ``(q, k, v, block, earlier, position)``; queries are the last T of S tokens, key 0 begins a block.
        strict: ``(q, k, v, query_ids, key_ids, rules, position)``, ids ``[B, H, T]`` and ``[B, H, S]``.
        topw: ``(q, k, v, query_ids, key_ids, rules, position)``, ids ``[B, H, K, w]``, ascending.
        assigned, taken: as in ``routing``.

    ``position`` is that of these heads. Queries and keys are rotated, but those queries that ``local`` may rotate by
    itself, see ``Position.both``; biases are the operator's to add.
    """

    local: Callable[..., torch.Tensor]
    strict: Callable[..., torch.Tensor]
    topw: Callable[..., torch.Tensor]
    assigned: Callable[..., torch.Tensor] = assigned
    taken: Callable[..., torch.Tensor] = taken


class RoutingAttention(nn.Module):
    """Projections and centroids around the operators. The first heads are local, the others routed.

    Centroids are buffers that no call changes: ``routing.updated`` gives their next value, ``load_centroids`` sets it.
    """

    means: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor

    def __init__(self, dims: Dims, params: RoutingParams, operators: Operators, position: Position):
        super().__init__()
        self.position = position
        self.params, self.operators = params, operators
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.local = params.local_heads(dims.num_heads)
        self.routed = dims.num_heads - self.local
        self.rules = Rules(params.num_clusters, dims.causal or params.masked, params.exclude_self)
        width = dims.d_model
        self.q, self.v, self.o = (nn.Linear(width, width) for _ in range(3))
        key_heads = self.local if params.shared else dims.num_heads
        self.k = nn.Linear(width, key_heads * self.head_dim) if key_heads else None
        means = normalised(torch.randn(self.routed, params.num_clusters, self.head_dim))
        self.register_buffer("means", means)
        self.register_buffer("sums", means.clone())
        self.register_buffer("counts", torch.ones(means.shape[:2]))

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        n, mixed, before = self.local, [], 0 if state is None else state.tokens
        q, k, v = self._projected(x)
        if n:
            heads, state = self._attend_locally(q[:, :n], k[:, :n], v[:, :n], before, state)
            mixed.append(heads.transpose(1, 2))
        if self.routed:
            heads, state = self._attend_in_clusters(q[:, n:], k[:, n:], v[:, n:], before, state)
            mixed.append(heads.transpose(1, 2))
        if state is not None:
            state = state._replace(tokens=before + x.shape[1])
        del q, k, v  # else they would live through the output projection
        return Output(self.o(torch.cat(mixed, dim=2).flatten(2)), state)

    def vectors(self, x: torch.Tensor) -> torch.Tensor:
        """What is compared with the centroids: routed queries, then routed keys where they differ, ``[B, H, n, D]``."""
        q, k, _ = self._projected(x)
        routed = [q[:, self.local :]] if self.params.shared else [q[:, self.local :], k[:, self.local :]]
        return normalised(torch.cat(routed, dim=2))

    def centroids(self) -> Centroids:
        """The three buffers as one value."""
        return Centroids(self.means, self.sums, self.counts)

    def load_centroids(self, centroids: Centroids) -> None:
        """Set the three buffers, rounded to their dtype."""
        for own, new in zip(self.centroids(), centroids, strict=True):
            own.copy_(new)

    def init_state(self, batch_size: int) -> State:
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size: int, context: int) -> State:
        weight, kept = self.q.weight, self.params.kept(context) if self.local else 0
        met = context if self.routed else 0

        def draw(heads: int, tokens: int) -> torch.Tensor:
            shape = (batch_size, heads, tokens, self.head_dim)
            return torch.randn(shape, device=weight.device, dtype=weight.dtype)

        shape = (batch_size, self.routed, met)
        ids = torch.randint(self.rules.num_clusters, shape, device=weight.device, dtype=torch.int32)
        local_k, local_v, k, v = (draw(*size) for size in ((self.local, kept),) * 2 + ((self.routed, met),) * 2)
        return State(local_k, local_v, k, v, ids, context)

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values by head; where routed heads share, keys are those of the local heads alone."""
        q, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.v))
        if self.k is None:
            return q, q[:, :0], v
        return q, split_heads(self.k(x), self.k.out_features // self.head_dim), v

    def _attend_locally(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, state: State | None
    ) -> tuple[torch.Tensor, State | None]:
        q, k = self.position.both(q, k, before)
        if state is not None:
            k, v = torch.cat((state.local_k, k), dim=2), torch.cat((state.local_v, v), dim=2)
            S = k.shape[2]
            old = S - self.params.kept(S)
            recent_k, recent_v = (a[:, :, old:].clone() if old else a for a in (k, v))
            state = state._replace(local_k=recent_k, local_v=recent_v)
        position = of_heads(self.position, slice(self.local))
        return self.operators.local(q, k, v, self.params.local_block, self.rules.earlier, position), state

    def _attend_in_clusters(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, state: State | None
    ) -> tuple[torch.Tensor, State | None]:
        position = of_heads(self.position, slice(self.local, None))
        q = normalised(q)
        k = q if self.params.shared else normalised(k)
        if self.params.selection == "topw":
            w = self.params.taken(q.shape[2])
            query_ids = self.operators.taken(q, self.means, w)
            key_ids = query_ids if self.params.shared else self.operators.taken(k, self.means, w)
            q, k = self._rotated(q, k, before)
            return self.operators.topw(q, k, v, query_ids, key_ids, self.rules, position), state
        query_ids = key_ids = self.operators.assigned(q, self.means)
        q, k = self._rotated(q, k, before)
        if state is not None:
            k, v = torch.cat((state.k, k), dim=2), torch.cat((state.v, v), dim=2)
            key_ids = torch.cat((state.ids, key_ids), dim=2)
            state = state._replace(k=k, v=v, ids=key_ids)
        return self.operators.strict(q, k, v, query_ids, key_ids, self.rules, position), state

    def _rotated(self, q: torch.Tensor, k: torch.Tensor, before: int) -> tuple[torch.Tensor, torch.Tensor]:
        """After the choice of clusters, which is by contents alone, and before tokens are gathered."""
        if not self.params.shared:
            return self.position.rotate_both(q, k, before)
        turned = self.position.rotate(q, before)
        return turned, turned


def routed_vectors(stack: Stack, x: torch.Tensor) -> list[torch.Tensor]:
    """:meth:`RoutingAttention.vectors` of every layer for ``x: [B, T, d_model]``: to learn from, or to see the load."""
    found = []
    for layer in stack.layers:
        found.append(layer.mixer.vectors(layer.norm_mixer(x)))
        x = layer(x).y
    return found


def build(dims: Dims, params: RoutingParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` layers; the impls differ in the operators alone."""
    from ctxbench.implementations.routing import METHOD

    operators = load(METHOD.impl(impl).run)
    layers: list[nn.Module] = [
        PreNormBlock(RoutingAttention(dims, params, operators, position), dims) for position in positions_of(dims, impl)
    ]
    return Stack(layers).to(device, dtype)
