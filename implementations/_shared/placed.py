"""Biases by distance of keys that lie elsewhere in every row of the batch, such as what each row retrieved for itself.

B batch, H heads, n queries, P keys, F the distance from which on all share one number of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Placed(NamedTuple):
    """The first keys of all, ``[B, H, P, D]``: where they lie, and what is added to their scores."""

    bias: torch.Tensor  # as ``Position.compact`` has it: slopes ``[H]``, constants, or a table ``[H, 2 F + 1]``
    places: torch.Tensor  # ``[B, P]`` integers, counted as the queries are
    first: int  # where the first query stands; the others follow it


def biases(placed: Placed, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Of the first ``count`` queries: ``[B, H, count, P]``."""
    away = distances(placed, count)
    if placed.bias.dim() == 1:
        slopes = placed.bias.to(torch.promote_types(dtype, torch.float32))[:, None, None]
        return (-slopes * away.abs()[:, None]).to(dtype)  # rounded once: bfloat16 has no distance of 257
    H, index = len(placed.bias), columns(placed.bias, away)
    # One number after the other: of a table's rows, autograd would add slices to slices, an index at a time.
    numbers = placed.bias.to(dtype).gather(1, index.flatten().expand(H, -1))
    return numbers.unflatten(1, index.shape).transpose(0, 1)


def distances(placed: Placed, count: int) -> torch.Tensor:
    """Of keys from each of the first ``count`` queries, in tokens: ``[B, count, P]``."""
    rows = torch.arange(placed.first, placed.first + count, device=placed.places.device)
    return placed.places[:, None] - rows[:, None]


def columns(table: torch.Tensor, away: torch.Tensor) -> torch.Tensor:
    """Where a table ``[H, 2 F + 1]`` has the number of each distance."""
    farthest = table.shape[1] // 2
    return away.clamp(-farthest, farthest) + farthest


def add_gradient(table: torch.Tensor, placed: Placed, scores: torch.Tensor) -> None:
    """Add to the gradient of a table ``[H, 2 F + 1]`` that of scores ``[B, H, n, P]``."""
    index = columns(table, distances(placed, scores.shape[2]))
    by_head = scores.transpose(0, 1).flatten(1).to(table.dtype)
    table.scatter_add_(1, index.flatten().expand(len(table), -1), by_head)
