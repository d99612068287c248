"""The source document's sketch of Transformer-XL, repaired only where it cannot run; its defects are kept.

Its ``RelativeMultiHeadAttention`` is defined nowhere. What stands here is multi-head attention without mask and
without positions, over the token axis, because the sketch joins memory and input along that axis (README).
The memory sits on the module and holds this layer's outputs of the call before; the whole input is one segment.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.blocks import PostNormBlock, Stack, merge_heads, split_heads
from ctxbench.implementations.transformer_xl.layer import RelativeAttention
from ctxbench.implementations.transformer_xl.params import TransformerXLParams
from ctxbench.method import Dims, Output


class SketchAttention(RelativeAttention):
    """The method's weights without distances: queries from ``x``, keys and values from memory and ``x``."""

    def forward(self, x: torch.Tensor, memory: Any = None) -> Output:
        context = x if memory is None else torch.cat((memory, x), dim=1)
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(project(context), self.num_heads) for project in (self.k, self.v))
        weights = (q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(dim=3)
        return Output(self.o(merge_heads(weights @ v)))


class SketchStack(Stack):
    """Layers with ``self.memories``: a call without state begins a sequence, one with state goes on from them."""

    def __init__(self, dims: Dims, params: TransformerXLParams):
        super().__init__([PostNormBlock(SketchAttention(dims, params, None), dims) for _ in range(dims.num_layers)])
        self.mem_len = params.mem_len
        self.memories: list[torch.Tensor | None] = [None] * dims.num_layers

    def forward(self, x: torch.Tensor, state: tuple[Any, ...] | None = None) -> Output:
        if state is None:
            self.memories = [None] * len(self.layers)
        for index, layer in enumerate(self.layers):
            memory = self.memories[index]
            x = layer(x, memory).y
            memory = x if memory is None else torch.cat((memory, x), dim=1)
            if memory.shape[1] > self.mem_len:
                memory = memory[:, -self.mem_len :].detach()
            self.memories[index] = memory
        return Output(x, None if state is None else tuple(self.memories))

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        """Forget the memory; the returned value is only a label, the module keeps the state itself."""
        self.memories = [None] * len(self.layers)
        return ()

    def state_at(self, batch_size: int, context: int) -> tuple[Any, ...]:
        weight: torch.Tensor = self.layers[0].mixer.q.weight  # type: ignore[assignment]
        shape = (batch_size, min(context, self.mem_len), weight.shape[1])
        self.memories = [torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in self.layers]
        return tuple(self.memories)
