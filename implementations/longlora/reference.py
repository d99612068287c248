"""Shift, cut into groups, attend, shift back, as the paper's pseudo-code does it; all scores of a group are kept.

B batch, H heads, T tokens, D head width, G tokens of a group, N groups.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from ctxbench.implementations._shared.positions import Bias, Position


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, wrap: bool, position: Position
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, result of that shape; ``group`` is even. The second half of the heads is shifted."""
    plain = q.shape[1] - q.shape[1] // 2
    halves = ((slice(0, plain), 0), (slice(plain, None), group // 2))
    mixed = [_attend(q, k, v, group, shift, wrap, position, heads) for heads, shift in halves]
    return torch.cat(mixed, dim=1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, shift: int, wrap: bool, position: Position,
    heads: slice,
) -> torch.Tensor:  # fmt: skip
    T = q.shape[2]
    missing = -T % group  # the sequence is filled up to whole groups
    q, k, v = (
        pad(part[:, heads], (0, 0, 0, missing)).roll(-shift, dims=2).unflatten(2, (-1, group)) for part in (q, k, v)
    )  # [B, H, N, G, D]
    place = torch.arange(T + missing, device=q.device).roll(-shift).view(-1, group)  # [N, G]
    query, key = place[:, :, None], place[:, None, :]
    visible = torch.ones(group, group, dtype=torch.bool, device=q.device).tril()
    # In a circle, what was filled up is seen by itself alone; else nobody sees what is later in the sequence.
    visible = visible & ((key < T) | (query >= T) if wrap else key <= query)
    scores = (q * q.shape[4] ** -0.5) @ k.transpose(3, 4)  # [B, H, N, G, G]
    if isinstance(position, Bias):
        scores = scores + position.bias(key - query, q.dtype)[heads]  # by places in the sequence, whatever was rolled
    scores = scores.masked_fill(~visible, float("-inf"))
    mixed = scores.softmax(dim=4) @ v
    return mixed.flatten(2, 3).roll(shift, dims=2)[:, :, :T]
