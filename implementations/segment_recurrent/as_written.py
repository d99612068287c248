"""The source document's RecurrentMemoryTransformer, defects and all; README.md lists them. Written anew.

As it stands there, attention reads the batch as the sequence and the second segment cannot be joined with its memory.
Repaired is that alone: attention runs over the token axis, along which the sketch joins memory and segment.
``batch_first=False`` brings the original back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import FeedForward
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.method import Dims, Output


class SketchLayer(nn.Module):
    """Post-norm layer; the memory is a parameter of the call and a result, and the caller keeps it."""

    def __init__(self, dims: Dims, params: SegmentRecurrentParams, batch_first: bool):
        super().__init__()
        width, heads = dims.d_model, dims.num_heads
        self.memory_len = params.memory_len
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=batch_first)
        self.ffn = FeedForward(width, dims.d_ff) if dims.d_ff else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width) if dims.d_ff else None
        self.memory_gate = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        context = x if memory is None else torch.cat((memory, x), dim=1)
        x = self.norm1(x + self.self_attention(x, context, context)[0])
        if memory is not None:
            x = self.norm2(x + self.cross_attention(x, memory, memory)[0])
        if self.ffn is not None and self.norm3 is not None:
            x = self.norm3(x + self.ffn(x))
        return x, self.update_memory(x, memory)

    def update_memory(self, states: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
        """Append the last quarter's worth of outputs. The gate is computed and forgotten."""
        torch.sigmoid(self.memory_gate(states))
        candidates = states[:, -self.memory_len // 4 :]  # rounds the negative number: a quarter, rounded up
        if memory is None:
            return candidates
        joined = torch.cat((memory, candidates), dim=1)
        return joined[:, -self.memory_len :] if joined.shape[1] > self.memory_len else joined


class SketchStack(nn.Module):
    """Segment by segment through all layers, with ``self.memory_states`` on the module.

    A call without state stands for ``reset_memory=True``; one with state goes on from what the module holds.
    """

    layers: Any

    def __init__(self, dims: Dims, params: SegmentRecurrentParams, batch_first: bool = True):
        super().__init__()
        self.segment_len = params.segment_len
        self.layers = nn.ModuleList([SketchLayer(dims, params, batch_first) for _ in range(dims.num_layers)])
        self.memory_states: list[torch.Tensor | None] = [None] * dims.num_layers

    def forward(self, x: torch.Tensor, state: tuple[Any, ...] | None = None) -> Output:
        if state is None:
            self.memory_states = [None] * len(self.layers)
        outputs = []
        for start in range(0, x.shape[1], self.segment_len):
            segment = x[:, start : start + self.segment_len]
            for index, layer in enumerate(self.layers):
                segment, self.memory_states[index] = layer(segment, self.memory_states[index])
            outputs.append(segment)
        return Output(torch.cat(outputs, dim=1), None if state is None else tuple(self.memory_states))

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        """Forget the memory; the returned value is only a label, the module keeps the state itself."""
        self.memory_states = [None] * len(self.layers)
        return ()

    def state_at(self, batch_size: int, context: int) -> tuple[Any, ...]:
        """Fill the module with memories as long as after ``context`` tokens, contents random."""
        whole, rest = divmod(context, self.segment_len)
        quarter = -(-self.layers[0].memory_len // 4)
        items = whole * min(quarter, self.segment_len) + min(quarter, rest)
        weight = self.layers[0].memory_gate.weight
        shape = (batch_size, min(items, self.layers[0].memory_len), weight.shape[0])
        self.memory_states = [
            torch.randn(shape, device=weight.device, dtype=weight.dtype) if items else None for _ in self.layers
        ]
        return tuple(self.memory_states)
