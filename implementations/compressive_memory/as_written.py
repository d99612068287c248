"""The source document's compressive memory, defects and all; see README.md for the list.

The sketch is connected to nothing. Here a layer hands it the blocks of its input and lets the tokens attend to what it
returns: the least that makes it a layer. B batch, n item_len.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from ctxbench.implementations._shared.blocks import PreNormBlock, merge_heads, split_heads
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams
from ctxbench.method import Dims, Output


class SketchMemory(nn.Module):
    """Lists of blocks on the module: ``capacity // rate`` as they are, then compressed ones."""

    def __init__(self, d_model: int, capacity: int, rate: int, top_k: int):
        super().__init__()
        self.rate, self.top_k = rate, top_k
        self.most_recent = capacity // rate
        self.most_compressed = capacity - self.most_recent
        self.recent: list[torch.Tensor] = []
        self.compressed: list[torch.Tensor] = []
        self.compressor = nn.Sequential(
            nn.Linear(rate * d_model, 2 * d_model), nn.ReLU(), nn.Linear(2 * d_model, d_model)
        )

    def add(self, block: torch.Tensor) -> None:
        """Keep a block ``[B, n, d_model]``; when there are too many, merge the oldest, feature by feature."""
        self.recent.append(block)
        if len(self.recent) > self.most_recent:
            oldest, self.recent = self.recent[: self.rate], self.recent[self.rate :]
            self.compressed.append(self.compressor(torch.cat(oldest, dim=2)))
            if len(self.compressed) > self.most_compressed:
                self.compressed.pop(0)

    def retrieve(self, query: torch.Tensor) -> torch.Tensor | None:
        """The blocks most similar to the mean of ``query``, on average over the batch, best first."""
        blocks = self.recent + self.compressed
        if not blocks:
            return None
        similar = [
            float(cosine_similarity(query.mean(dim=1), block.mean(dim=1), dim=1).mean().detach()) for block in blocks
        ]
        order = sorted(range(len(blocks)), key=lambda number: similar[number], reverse=True)
        return torch.cat([blocks[number] for number in order[: self.top_k]], dim=1)


class SketchMixer(nn.Module):
    """Every block goes into the memory, then the whole input asks it once."""

    def __init__(self, dims: Dims, params: CompressiveMemoryParams):
        super().__init__()
        self.num_heads, self.item_len = dims.num_heads, params.item_len
        capacity = params.recent_len + params.compressed_len
        self.memory = SketchMemory(dims.d_model, capacity, params.rate, params.top_k)
        self.q, self.k, self.v, self.o = (nn.Linear(dims.d_model, dims.d_model, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, state: None = None) -> Output:
        for block in x.split(self.item_len, dim=1):
            self.memory.add(block)
        found = self.memory.retrieve(x)
        q, k, v = (
            split_heads(project(rows), self.num_heads)
            for project, rows in ((self.q, x), (self.k, found), (self.v, found))
        )
        return Output(self.o(merge_heads(scaled_dot_product_attention(q, k, v))))


class SketchTransformer(nn.Module):
    """``[B, T, d_model]`` to the same shape; what it remembers goes neither in nor out."""

    def __init__(self, dims: Dims, params: CompressiveMemoryParams):
        super().__init__()
        self.layers = nn.ModuleList([PreNormBlock(SketchMixer(dims, params), dims) for _ in range(dims.num_layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).y
        return x
