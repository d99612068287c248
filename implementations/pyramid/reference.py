"""The operators of the pyramid, written out: attention of one level or to the one below, and fusion of all levels.

B batch, H heads of a level, D head width, N cells of a level, S cells including earlier calls, T tokens,
d_l width of level l.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.pyramid.layer import Operators


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position, span: int
) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D) + bias) v``, distances in tokens, of which a cell has ``span``.

    ``q: [B, H, N, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, N, D]``.
    """
    N, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, N, S]
    bias = position.rectangle(N, S, S - N, like=q, step=span)
    if bias is not None:
        scores = scores + bias
    if causal:
        visible = torch.ones(N, S, dtype=torch.bool, device=q.device).tril(S - N)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=3) @ v


def attend_below(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, pool: int, causal: bool
) -> torch.Tensor:
    """Cells over those of the level below: cell c, the first being ``start``, sees ``(c + 1) pool`` of them."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, N, S]
    if causal:
        cell = torch.arange(start, start + q.shape[2], device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) >= (cell + 1) * pool, float("-inf"))
    return scores.softmax(dim=3) @ v


def fuse(
    fine: torch.Tensor, coarse: list[torch.Tensor], start: int, pool: int, causal: bool,
    weight: torch.Tensor, bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """``y = x_0 + W [up(x_1); up(x_2); ...] + b``, where ``up`` gives every token the cell it may read.

    ``fine: [B, T, d]`` are tokens ``start .. start + T - 1``. Level l in ``coarse: [B, rows, d_l]`` is, bidirectional,
    all its cells; causal, the last cell completed before ``start`` (zeros if none), then the newly completed ones.
    A causal token i reads cell ``floor((i + 1) / s) - 1``, the last one that is complete with it, s = pool^l.
    """
    token = torch.arange(start, start + fine.shape[1], device=fine.device)
    columns = []
    for level, rows in enumerate(coarse, start=1):
        span = pool**level
        reads = (token + 1 if causal else token).div(span, rounding_mode="floor")
        row = reads - start // span if causal else reads
        columns.append(rows[:, row])  # [B, T, d_l]
    return fine + linear(torch.cat(columns, dim=2), weight, bias)


OPERATORS = Operators(attend, attend_below, fuse)
