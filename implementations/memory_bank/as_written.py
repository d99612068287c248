"""The source document's memory-augmented transformer, defects and all; see README.md for the list.

B batch, T tokens, M slots. Written anew; repaired only where the tracer cannot follow: slots are picked by index
tensors, not by a 0-d index that would read a value back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import FeedForward
from ctxbench.implementations.memory_bank.params import MemoryBankParams
from ctxbench.method import Dims


class SketchBank(nn.Module):
    """Slots and keys as parameters, shared by all layers and batch rows; writing rewrites the parameter."""

    def __init__(self, dims: Dims, params: MemoryBankParams):
        super().__init__()
        d_model, num_slots = dims.d_model, params.num_slots
        self.values = nn.Parameter(torch.randn(num_slots, d_model))
        self.keys = nn.Parameter(torch.randn(num_slots, d_model))
        self.q, self.k, self.v = (nn.Linear(d_model, d_model) for _ in range(3))
        self.update = nn.Linear(2 * d_model, d_model)
        self.slot_logits = nn.Linear(d_model, num_slots)

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Single-head attention of all tokens over all slots: ``[B, T, d_model]`` and the weights ``[B, T, M]``."""
        q, k, v = self.q(x), self.k(self.keys)[None], self.v(self.values)[None]
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(x.shape[2]), dim=2)
        return weights @ v, weights

    def write(self, x: torch.Tensor, pooled: torch.Tensor) -> None:
        """Row by row: move the arg-max slot towards the row's mean, behind autograd's back."""
        weights = torch.softmax(self.slot_logits(pooled), dim=1)
        for row in range(x.shape[0]):
            content = x[row].mean(dim=0)
            slot = weights[row].argmax(dim=0, keepdim=True)
            old = self.values[slot][0]
            gate = torch.sigmoid(self.update(torch.cat((old, content))))
            self.values.data[slot] = (gate * content + (1 - gate) * old).detach()[None]


class SketchLayer(nn.Module):
    """Post-norm layer around the shared bank. ``memory_attention`` is made and never called."""

    def __init__(self, dims: Dims, bank: SketchBank):
        super().__init__()
        d_model, num_heads = dims.d_model, dims.num_heads
        self.bank = bank
        self.self_attention = nn.MultiheadAttention(d_model, num_heads)
        self.memory_attention = nn.MultiheadAttention(d_model, num_heads)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, dims.d_ff, nn.functional.relu) if dims.d_ff else None
        self.norm3 = nn.LayerNorm(d_model) if dims.d_ff else None
        self.memory_gate = nn.Linear(2 * d_model, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.self_attention(x, x, x)
        x = self.norm1(x + mixed)
        read, _ = self.bank.read(x)
        gate = torch.sigmoid(self.memory_gate(torch.cat((x, read), dim=2)))
        x = self.norm2(x + (gate * read + (1 - gate) * x))
        if self.ffn is not None and self.norm3 is not None:
            x = self.norm3(x + self.ffn(x))
        self.bank.write(x, x.mean(dim=1))
        return x


class SketchTransformer(nn.Module):
    """``[B, T, d_model]`` to the same shape; no state goes in or comes out, it hides in the weights."""

    def __init__(self, dims: Dims, params: MemoryBankParams):
        super().__init__()
        self.bank = SketchBank(dims, params)
        self.layers = nn.ModuleList([SketchLayer(dims, self.bank) for _ in range(dims.num_layers)])
        self.norm = nn.LayerNorm(dims.d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
