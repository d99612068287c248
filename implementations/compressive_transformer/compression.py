"""Compression functions: tokens that leave the memory become fewer entries (Rae et al. 2019, section 3.2).

Each maps what leaves together, ``[B, n, d_model]``, to ``[B, n / rate, d_model]``. c is the rate.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from ctxbench.implementations.compressive_transformer.params import (
    DILATIONS,
    KERNEL,
    CompressiveTransformerParams,
)


class Pool(nn.Module):
    """The largest or the mean value of ``rate`` neighbours, channel by channel."""

    def __init__(self, kind: str, rate: int):
        super().__init__()
        self.kind, self.rate = kind, rate

    def forward(self, old: torch.Tensor) -> torch.Tensor:
        groups = old.unflatten(1, (-1, self.rate))
        return groups.amax(dim=2) if self.kind == "max" else groups.mean(dim=2)


class Convolution(nn.Conv1d):
    """Kernel and stride ``rate``: one product over groups of neighbours, ``[B, n / c, c d] @ [c d, d]``."""

    def __init__(self, d_model: int, rate: int):
        super().__init__(d_model, d_model, rate, stride=rate)

    def forward(self, old: torch.Tensor) -> torch.Tensor:
        groups = old.unflatten(1, (-1, self.stride[0])).flatten(2)
        return linear(groups, self.weight.transpose(1, 2).flatten(1), self.bias)


class DilatedConvolution(nn.Module):
    """Dilated layers with zeros beyond both ends of what leaves together, then a :class:`Convolution`."""

    def __init__(self, d_model: int, rate: int):
        super().__init__()
        self.dilated = nn.ModuleList(
            nn.Conv1d(d_model, d_model, KERNEL, dilation=step, padding=step * (KERNEL // 2)) for step in DILATIONS
        )
        self.compress = Convolution(d_model, rate)

    def forward(self, old: torch.Tensor) -> torch.Tensor:
        for layer in self.dilated:
            old = layer(old.transpose(1, 2)).transpose(1, 2).relu()
        return self.compress(old)


def most_used(old: torch.Tensor, average: torch.Tensor, rate: int) -> torch.Tensor:
    """The ``n / rate`` tokens that got most attention, in their order; ``average: [B, n]``."""
    kept = average.topk(old.shape[1] // rate, dim=1).indices.sort(dim=1).values
    return old.gather(1, kept[:, :, None].expand(-1, -1, old.shape[2]))


def compression_for(d_model: int, params: CompressiveTransformerParams) -> nn.Module | None:
    """None where nothing is compressed or ``most_used`` selects, which needs to know the attention."""
    if not params.compressed_len or params.compression == "most_used":
        return None
    if params.compression == "conv":
        return Convolution(d_model, params.rate)
    if params.compression == "dilated_conv":
        return DilatedConvolution(d_model, params.rate)
    return Pool(params.compression, params.rate)
