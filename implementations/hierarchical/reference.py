"""Both forms written out: one masked softmax over all scales, and branches that meet in a concatenation.

B batch, H heads, T tokens, D head width, n cells of a scale, s tokens of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from ctxbench.implementations.hierarchical.layer import Operators
from ctxbench.implementations.hierarchical.params import Scale


def attend(
    q: torch.Tensor, levels: Sequence[torch.Tensor], scales: Sequence[Scale], start: int,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``softmax(q k^T / sqrt(D) + log s + bias) v`` over the tokens and cells that each query sees.

    Args:
        q: queries ``[B, H, T, D]`` of tokens ``start .. start + T - 1``.
        levels: of each scale the keys and values ``[2, B, H, n, D]`` of its last n complete cells.
        scales: tokens of a cell of each scale, and how many cells of it a token sees.
        start: tokens before the first query.
        line: biases ``[H, start + T]``, by tokens from a cell's last one to the query.

    Returns:
        ``[B, H, T, D]``.
    """
    keys, values = torch.cat(list(levels), dim=3)
    lengths = [level.shape[3] for level in levels]
    weight = [q.new_full((n,), math.log(scale.span)) for n, scale in zip(lengths, scales, strict=True)]
    seen = [visible(start, q.shape[2], n, scale, q.device) for n, scale in zip(lengths, scales, strict=True)]
    scores = (q * q.shape[3] ** -0.5) @ keys.transpose(2, 3) + torch.cat(weight)  # [B, H, T, sum of n]
    if line is not None:
        back = [distance(start, q.shape[2], n, scale, q.device) for n, scale in zip(lengths, scales, strict=True)]
        scores = scores + line[:, torch.cat(back, dim=1).clamp(min=0)]
    scores = scores.masked_fill(~torch.cat(seen, dim=1), float("-inf"))
    return scores.softmax(dim=3) @ values


def distance(start: int, T: int, n: int, scale: Scale, device: torch.device) -> torch.Tensor:
    """Tokens from the last one of each of n cells to each of T tokens, ``[T, n]``."""
    total = (start + T) // scale.span
    last = torch.arange(total - n + 1, total + 1, device=device) * scale.span - 1
    return torch.arange(start, start + T, device=device)[:, None] - last


def visible(start: int, T: int, n: int, scale: Scale, device: torch.device) -> torch.Tensor:
    """Which of the last n complete cells each of T tokens sees: ``[T, n]``."""
    tokens = torch.arange(start + 1, start + T + 1, device=device)[:, None]
    complete = (tokens - scale.behind).div(scale.span, rounding_mode="floor")
    total = (start + T) // scale.span
    cell = torch.arange(total - n, total, device=device)
    seen = cell < complete
    if scale.handed is not None:  # cells that make up one of the next scale, once that is far enough back
        coarser = (tokens - scale.handed).div(scale.span * scale.group, rounding_mode="floor")
        return seen & (cell >= coarser * scale.group)
    return seen if scale.most is None else seen & (cell >= complete - scale.most)


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D)) v`` among the cells of one scale, ``[B, H, n, D]``."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    return scores.softmax(dim=3) @ v


def fuse(
    branches: Sequence[torch.Tensor], kernels: Sequence[torch.Tensor], biases: Sequence[torch.Tensor],
    weight: torch.Tensor, bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """``W [y_0; up(y_1); up(y_2); ...] + b``, where ``up`` gives each place in a cell a matrix of its own.

    Args:
        branches: ``[B, n, d]`` of each scale, tokens first.
        kernels: of each coarse scale ``[d, d, s]``: from, to, place in the cell.
        biases: of each coarse scale ``[d]``.
        weight: ``[d, d * number of scales]``.
        bias: ``[d]``.

    Returns:
        ``[B, T, d]``.
    """
    T = branches[0].shape[1]
    columns = [branches[0]]
    for cells, kernel, shift in zip(branches[1:], kernels, biases, strict=True):
        up = torch.einsum("bnc,cds->bnsd", cells, kernel) + shift
        columns.append(up.flatten(1, 2)[:, :T])
    return linear(torch.cat(columns, dim=2), weight, bias)


OPERATORS = Operators(attend, mix, fuse)
