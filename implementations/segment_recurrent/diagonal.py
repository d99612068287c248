"""Diagonal scheduling (Sivtsov et al. 2025): cells of segments and layers that do not wait for each other, together.

The cell of segment t and layer l needs cell (t, l - 1) for its input and (t - 1, l) for its memory, so all cells with
one t + l are independent. Those of equal shapes are computed at once: weights stacked over layers, one batched product
for each map, one fused attention with the layers in its batch. Exact; the chain is ``segments + layers - 1`` long
instead of ``segments * layers``. G cells, B batch, n tokens, m items; cells have falling t and rising l.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.diagonal import Weights, diagonals
from ctxbench.implementations.segment_recurrent.blocked import attend
from ctxbench.implementations.segment_recurrent.layer import (
    Look,
    Operator,
    SegmentRecurrentLayer,
    SegmentRecurrentStack,
    State,
    layers_of,
)
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.method import Dims, Output


class DiagonalStack(SegmentRecurrentStack):
    """The layers and weights of ``blocked`` in another order; a cell that fits no other is the layer's own step."""

    impl = "diagonal"
    operator: Operator = staticmethod(attend)

    def __init__(self, dims: Dims, params: SegmentRecurrentParams):
        super().__init__(layers_of(dims, params, self.operator, self.impl))
        self.params = params

    def forward(self, x: torch.Tensor, state: tuple[Any, ...] | None = None) -> Output:
        states = list(self.init_state(x.shape[0]) if state is None else state)
        hidden = list(x.split(self.layers[0].pieces(states[0].tokens, x.shape[1]), dim=1))
        segments, depth = len(hidden), len(self.layers)
        weights = Weights(self.layers) if min(segments, depth) > 1 else None
        for diagonal, layers in enumerate(diagonals(segments, depth)):
            shapes = {layer: self.shape(hidden[diagonal - layer], states, layer) for layer in layers}
            for _, run in itertools.groupby(layers, shapes.__getitem__):
                group = list(run)
                cells = [(hidden[diagonal - layer], states[layer]) for layer in group]
                # Of one diagonal only the lowest layer may have come to the last segment, which nobody will read.
                unread = state is None and diagonal - group[0] == segments - 1
                if weights is None or len(group) == 1:
                    ((part, before),) = cells
                    results = [self.layers[group[0]].step(part, before, not unread)]
                else:
                    results = self.together(weights, group[0], cells, int(unread))
                for layer, (y, after) in zip(group, results, strict=True):
                    hidden[diagonal - layer], states[layer] = y, after
        y = hidden[0] if segments == 1 else torch.cat(hidden, dim=1)
        return Output(y, None if state is None else tuple(after.detached() for after in states))

    def shape(self, part: torch.Tensor, states: list[State], layer: int) -> tuple[int, ...]:
        """Equal for cells that can be computed together: whole segments with equally long memories.

        Where gradients are asked for, also with a cut at the same end: a product has a gradient for all cells or none.
        """
        S, state, chain = self.params.segment_len, states[layer], self.params.bptt_depth + 1
        segment, begun = divmod(state.tokens, S)
        if begun or part.shape[1] < S:
            return (-1, layer)
        cuts = (segment % chain, (segment + 1) % chain) if chain and torch.is_grad_enabled() else (1, 1)
        return (state.memory.shape[1], *(int(cut == 0) for cut in cuts))

    def together(
        self, weights: Weights, first: int, cells: list[tuple[torch.Tensor, State]], unread: int
    ) -> list[tuple[torch.Tensor, State]]:
        """Whole segments in layers ``first``, ``first + 1``, ...; the first ``unread`` of them remember nothing."""
        layers: list[SegmentRecurrentLayer] = list(self.layers)[first : first + len(cells)]
        S, H, B = self.params.segment_len, layers[0].num_heads, cells[0][0].shape[0]
        cuts = (layer.cut(state.memory, state.tokens // S) for layer, (_, state) in zip(layers, cells, strict=True))
        x, memory = torch.stack([part for part, _ in cells]), torch.stack(list(cuts))

        def heads(rows: torch.Tensor, name: str) -> torch.Tensor:
            return split_heads(weights(name, rows, first).flatten(0, 1), H)

        def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
            parts = zip(layers, rows.unbind(0), strict=True)
            return torch.stack([layer.get_submodule(name)(part) for layer, part in parts])

        def merged(mixed: torch.Tensor) -> torch.Tensor:
            return merge_heads(mixed).unflatten(0, (len(cells), B))

        position, oldest = layers[0].position, -memory.shape[2]  # biases are one object for all layers
        look = Look(position, -oldest, causal=True, begins=self.params.memory_len <= S)
        known = position.rotate(heads(memory, "k"), oldest), heads(memory, "v")
        (q, k), v = position.both(heads(x, "q"), heads(x, "k"), 0), heads(x, "v")
        if getattr(self.operator, "apart", False):
            mixed = self.operator(q, k, v, look, known)
        else:
            k, v = (torch.cat(parts, dim=2) for parts in zip(known, (k, v), strict=True))
            mixed = self.operator(q, k, v, look)
        x = norm(x + weights("o", merged(mixed), first), "norm_self")
        if memory.shape[2]:
            q, k = position.queries(heads(x, "read_q"), 0), position.rotate(heads(memory, "read_k"), oldest)
            mixed = self.operator(q, k, heads(memory, "read_v"), look.second())
            x = x + weights("read_o", merged(mixed), first)
        x = norm(x, "norm_read")
        if layers[0].ffn is not None:
            hidden = layers[0].ffn.activation(weights("ffn.up", x, first))
            x = norm(x + weights("ffn.down", hidden, first), "norm_ffn")
        tails = x[:, :, S - self.params.added :]
        gates = torch.sigmoid(weights("gate", tails[unread:], first + unread)).unbind(0)
        memories = list(memory[:unread]) + [
            layer.mixed(part, tail, gate)
            for layer, part, tail, gate in zip(layers[unread:], memory[unread:], tails[unread:], gates, strict=True)
        ]
        return [
            (y, State(after, *layer.no_segment(B), state.tokens + S))
            for layer, y, after, (_, state) in zip(layers, x, memories, cells, strict=True)
        ]
