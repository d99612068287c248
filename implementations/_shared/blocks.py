"""The layer around a mixer: norms, residuals, feed-forward network, the stack, and head splitting.

B batch, T tokens, H heads, D head width; d_model = H * D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ctxbench.method import Dims, Output


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """``[B, T, d_model] -> [B, H, T, D]``, without a copy."""
    B, T, d_model = x.shape
    return x.view(B, T, num_heads, d_model // num_heads).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, D] -> [B, T, d_model]``."""
    B, H, T, D = x.shape
    return x.transpose(1, 2).reshape(B, T, H * D)


class FeedForward(nn.Module):
    """Two linear maps with an activation between; ``[B, T, d_model] -> [B, T, d_model]``."""

    def __init__(
        self, d_model: int, d_ff: int, activation: Callable[[torch.Tensor], torch.Tensor] = nn.functional.gelu
    ):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


class PreNormBlock(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))``; ``d_ff = 0`` drops the second half.

    The mixer is called as ``mixer(x, state) -> Output``.
    """

    def __init__(self, mixer: nn.Module, dims: Dims):
        super().__init__()
        self.norm_mixer = nn.LayerNorm(dims.d_model)
        self.mixer = mixer
        self.norm_ffn = nn.LayerNorm(dims.d_model) if dims.d_ff else None
        self.ffn = FeedForward(dims.d_model, dims.d_ff) if dims.d_ff else None

    def forward(self, x: torch.Tensor, state: Any = None) -> Output:
        y, state = self.mixer(self.norm_mixer(x), state)
        x = x + y
        del y  # else it would live through the feed-forward network
        if self.ffn is not None and self.norm_ffn is not None:
            x = x + self.ffn(self.norm_ffn(x))
        return Output(x, state)


class PostNormBlock(nn.Module):
    """``norm(x + mixer(x))``, then ``norm(x + ffn(x))``, the original order; ``d_ff = 0`` drops the second."""

    def __init__(
        self, mixer: nn.Module, dims: Dims, activation: Callable[[torch.Tensor], torch.Tensor] = nn.functional.relu
    ):
        super().__init__()
        self.mixer = mixer
        self.norm_mixer = nn.LayerNorm(dims.d_model)
        self.ffn = FeedForward(dims.d_model, dims.d_ff, activation) if dims.d_ff else None
        self.norm_ffn = nn.LayerNorm(dims.d_model) if dims.d_ff else None

    def forward(self, x: torch.Tensor, state: Any = None) -> Output:
        y, state = self.mixer(x, state)
        x = self.norm_mixer(x + y)
        del y  # else it would live through the feed-forward network
        if self.ffn is not None and self.norm_ffn is not None:
            x = self.norm_ffn(x + self.ffn(x))
        return Output(x, state)


class Stack(nn.Module):
    """Layers one after the other; the state is a tuple with one entry a layer.

    Every layer's mixer offers ``init_state(batch_size)`` and ``state_at(batch_size, context)`` where the method
    has a state.
    """

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, state: tuple[Any, ...] | None = None) -> Output:
        if state is None:
            for layer in self.layers:
                x = layer(x).y
            return Output(x)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, new = layer(x, before)
            after.append(new)
        return Output(x, tuple(after))

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        """State before the first token."""
        return tuple(layer.mixer.init_state(batch_size) for layer in self.layers)

    def state_at(self, batch_size: int, context: int) -> tuple[Any, ...]:
        """State shaped as after ``context`` tokens, contents random."""
        return tuple(layer.mixer.state_at(batch_size, context) for layer in self.layers)
