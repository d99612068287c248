"""Diagonal scheduling of whole blocks, where every layer has a state of its own; exact, see ``_shared/diagonal``.

The chain is ``blocks + layers - 1`` long instead of ``blocks * layers``. G layers of one diagonal, B batch, b tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.diagonal import Weights, diagonals
from ctxbench.implementations._shared.joined import Joined
from ctxbench.implementations.block_state.layer import BlockStateStack, State
from ctxbench.method import Output


class DiagonalStack(BlockStateStack):
    """The layers and weights of the other impls in another order; tokens around whole blocks go block after block."""

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        b, carried = self.params.block_len, state is not None
        state = self.init_state(x.shape[0]) if state is None else state
        outputs = Joined(x.shape[1])
        if state.tokens % b:  # the block that an earlier call began
            y, state = self.advance(x[:, : b - state.tokens % b], state, follows=True)
            x = x[:, y.shape[1] :]
            outputs.add(y)
        blocks = list(x[:, : x.shape[1] // b * b].split(b, dim=1)) if x.shape[1] >= b else []
        rest = x[:, len(blocks) * b :]
        if blocks:
            state = self.whole(blocks, state, carried or rest.shape[1] > 0, outputs)
        if rest.shape[1]:
            y, state = self.advance(rest, state, follows=carried)
            outputs.add(y)
        return Output(outputs.result(), state if carried else None)

    def whole(self, blocks: list[torch.Tensor], state: State, follows: bool, outputs: Joined) -> State:
        """Add outputs of blocks ``[B, b, d_model]``; the state after them where anything ``follows`` that reads it."""
        weights, vectors, under_way = Weights(self.layers), list(state.vectors), dict(enumerate(blocks))
        for diagonal, layers in enumerate(diagonals(len(blocks), len(self.layers))):
            cells = [(vectors[layer], under_way[diagonal - layer]) for layer in layers]
            # One copy: states, then a block, of each batch row of each layer.
            rows = [rows for states, block in cells for pair in zip(states, block, strict=True) for rows in pair]
            x = torch.cat(rows).view(len(layers), len(cells[0][0]), -1, rows[0].shape[1])
            made = self.together(weights, layers[0], x)[:, :, vectors[0].shape[1] :]
            del cells, rows, x
            for layer, y in zip(layers, made, strict=True):
                under_way[diagonal - layer] = y
                if follows or diagonal - layer < len(blocks) - 1:  # else nobody would read it
                    vectors[layer] = self.updated(layer, vectors[layer], y)
            del made, y
            if layers[-1] == len(self.layers) - 1:  # a block has passed all layers
                outputs.add(under_way.pop(diagonal - layers[-1]))
        B, tokens = blocks[0].shape[0], state.tokens + len(blocks) * self.params.block_len
        return State(tuple(vectors), *self._empty(B, 0, torch.zeros), tokens)

    def updated(self, layer: int, vectors: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A layer's state after the outputs ``y`` of a block."""
        wide = torch.promote_types(y.dtype, torch.float32)
        pooled = y[:, -1].to(wide) if self.params.pool == "last" else y.sum(dim=1, dtype=wide) / y.shape[1]
        new: torch.Tensor = self.updates[layer](vectors, pooled.to(vectors.dtype))
        return new

    def together(self, weights: Weights, first: int, x: torch.Tensor) -> torch.Tensor:
        """Rows of blocks, states first, ``x: [G, B, k + b, d_model]``, through layers ``first``, ``first + 1``, ..."""
        layers: list[Any] = list(self.layers)[first : first + len(x)]
        mixer = layers[0].mixer

        def norm(rows: torch.Tensor, name: str) -> torch.Tensor:
            parts = zip(layers, rows.unbind(0), strict=True)
            return torch.stack([layer.get_submodule(name)(part) for layer, part in parts])

        normed = norm(x, "norm_mixer")
        q, k, v = (
            split_heads(weights(f"mixer.{name}", normed, first).flatten(0, 1), mixer.num_heads) for name in "qkv"
        )
        q, k = mixer.position.both(q, k, 0)
        mixed = merge_heads(mixer.operator(q, k, v, mixer.position)).unflatten(0, x.shape[:2])
        x = x + weights("mixer.o", mixed, first)
        if layers[0].ffn is not None:
            hidden = layers[0].ffn.activation(weights("ffn.up", norm(x, "norm_ffn"), first))
            x = x + weights("ffn.down", hidden, first)
        return x
