"""Biases by distance where the tokens of a cluster lie anywhere: a line of numbers a head, read pair by pair.

B batch, H heads, T queries, which are the last of S keys, W = T + S - 1 distances.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Bias, Position


def line_of(position: Position, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """What is added at the distances 1 - S to T - 1, ``[H, W]``, in the dtype of ``q``; None: nothing is."""
    if not isinstance(position, Bias):
        return None
    return position.bias(torch.arange(1 - k.shape[2], q.shape[2], device=q.device), q.dtype).contiguous()


def of_queries(line: torch.Tensor, T: int, tokens: torch.Tensor) -> torch.Tensor:
    """Numbers of queries ``[B * H, ...]`` of their heads: with a key's token each is a place in the line, flat."""
    H, W = line.shape
    heads = torch.arange(len(tokens), device=tokens.device) % H
    return (heads * W + T - 1).view(-1, *[1] * (tokens.dim() - 1)) - tokens


def gradient_of(line: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    """Zeros to add the line's gradient to, in single precision at least; None where nobody wants it."""
    if line is None or not wanted:
        return None
    return torch.zeros_like(line, dtype=torch.promote_types(line.dtype, torch.float32))
