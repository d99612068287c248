"""Diagonal scheduling of whole windows: window t of layer l together with window t + 1 of layer l - 1; exact.

All memories are local to their layer. Of one diagonal, neighbouring layers of one kind go together, see
``_shared/diagonal``: short-term layers below the long-term one, and above it all but the last, which has no mixing for
summary tokens. The attention of such a group is one call; what closes a window mixes few rows and goes layer by layer.
G layers of a group, B batch, n rows that ask, H heads, D head width.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn.functional import relu

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.diagonal import Weights, diagonals
from ctxbench.implementations._shared.joined import Joined
from ctxbench.implementations.melodi.layer import MelodiStack, Memory, State
from ctxbench.implementations.melodi.slots import Queue


class DiagonalStack(MelodiStack):
    """The layers and weights of the other impls in another order; operators take no bias."""

    def windows(self, x: torch.Tensor, state: State, follows: bool, outputs: Joined) -> State:
        W = self.params.window
        lead = -state.tokens % W
        if lead:  # the window that an earlier call began
            piece, x = x[:, :lead], x[:, lead:]
            state = super().windows(piece, state, follows or x.shape[1] > 0, outputs)
        count = max(0, x.shape[1] - (not follows)) // W  # windows that hand something on
        if count:
            state = self.whole(list(x[:, : count * W].split(W, dim=1)), state, outputs)
        return super().windows(x[:, count * W :], state, follows, outputs)

    def whole(self, parts: list[torch.Tensor], state: State, outputs: Joined) -> State:
        """Add outputs of whole windows ``[B, W, d_model]``; the state after them."""
        B, W, memories, rows = parts[0].shape[0], self.params.window, list(state.layers), dict(enumerate(parts))
        queue = Queue(self.params.long_slots, len(parts))
        weights = Weights(
            self.layers, ("q", "k", "v", "o") + (("ffn.up", "ffn.down") * (self.layers[0].ffn is not None))
        )
        for diagonal, layers in enumerate(diagonals(len(parts), len(self.layers))):
            if self.summary is not None and layers[0] == 0:
                rows[diagonal] = torch.cat((rows[diagonal], self.summary.expand(B, -1, -1)), dim=1)
            kinds = {layer: self.kind(layer, state.tokens // W + diagonal - layer) for layer in layers}
            for _, run in itertools.groupby(layers, kinds.__getitem__):
                group = list(run)
                cells = [(rows[diagonal - layer], memories[layer]) for layer in group]
                if len(group) > 1:
                    made = self.together(weights, group[0], cells, queue)
                else:
                    layer: Any = self.layers[group[0]]
                    made = [layer(*cells[0][:1], self.params.summary_tokens, cells[0][1], None, queue)]
                for layer, (after, memory) in zip(group, made, strict=True):
                    rows[diagonal - layer], memories[layer] = after, memory
                del after, memory, cells, made
            if layers[-1] == len(self.layers) - 1:  # a window has passed all layers
                outputs.add(rows.pop(diagonal - layers[-1])[:, :W])
        return State(tuple(memories), state.tokens + len(parts) * W)

    def kind(self, layer: int, window: int) -> tuple[bool, ...]:
        """Equal for layers that can go together. The first window's memory asks for no gradient, so it goes alone."""
        one: Any = self.layers[layer]
        return one.gate is not None, one.mix_summary is None, window == 0 and torch.is_grad_enabled()

    def together(
        self, weights: Weights, first: int, cells: list[tuple[torch.Tensor, Memory]], queue: Queue
    ) -> list[tuple[torch.Tensor, Memory]]:
        """Whole windows ``[B, W + U, d_model]`` in layers from ``first`` on, none of which has a long-term memory."""
        layers: list[Any] = list(self.layers)[first : first + len(cells)]
        x, begin, H = torch.stack([rows for rows, _ in cells]), self.params.short_slots, layers[0].num_heads

        def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
            parts = zip(layers, rows.unbind(0), strict=True)
            return torch.stack([layer.get_submodule(name)(part) for layer, part in parts])

        normed = norm(x, "norm")
        q, k, v = (weights(name, normed, first) for name in "qkv")  # [G, B, n, d_model]
        scales = torch.stack([layer.scale.abs() for layer in layers])[:, None, :, None, None]
        q = (layers[0]._unit(q.flatten(0, 1)).unflatten(0, x.shape[:2]) * scales).flatten(0, 1)
        k, v = layers[0]._unit(k.flatten(0, 1)), split_heads(v.flatten(0, 1), H)
        q, k = layers[0].position.both(q, k, begin)
        memory_k, memory_v = (torch.stack([memory[part] for _, memory in cells]).flatten(0, 1) for part in (0, 1))
        mixed = layers[0].operators.attend_apart(q, memory_k, memory_v, k, v, None)
        x = x + weights("o", merge_heads(mixed).unflatten(0, x.shape[:2]), first)
        if layers[0].ffn is not None:
            x = x + weights("ffn.down", relu(weights("ffn.up", norm(x, "norm_ffn"), first)), first)
        return [
            layer._close(rows, rows, self.params.summary_tokens, memory, queue)
            for layer, rows, (_, memory) in zip(layers, x.unbind(0), cells, strict=True)
        ]
