"""Attention by plain products, for bf16 on CPU; two null slots in place of all empty ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from ctxbench.implementations._shared import products

NULLS = 2


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, ``bias: [H, n, K]``; a row that sees no key gets 0.

    The last key is the last row's own, which nobody sees: with it, rows of scores begin where vectors do.
    """
    return products.attend(q, k, v, bias=bias, scale=1.0, strict=True)


def recall(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, empty: int) -> torch.Tensor:
    """``k, v: [B, H, F, D]`` and ``empty`` slots of zeros, all seen; no positions.

    A zero key has score 0 and value 0: ``empty`` of them add ``empty`` to the denominator and nothing else, and so do
    keys whose exponentials add up to it.
    """
    if not k.shape[2]:
        return torch.zeros_like(q)
    if not empty:
        return products.attend(q, k, v, causal=False, scale=1.0)
    k, v = (pad(slots, (0, 0, NULLS, 0)) for slots in (k, v))
    scores = torch.empty(NULLS, device=q.device, dtype=q.dtype)
    scores[0], scores[1] = null_scores(empty)
    return products.attend(q, k, v, causal=False, scale=1.0, first=scores)


def null_scores(empty: int) -> tuple[float, float]:
    """Scores whose exponentials add up to ``empty``: in bf16 one would be off by up to 3 %, two by a thousandth.

    The first is a multiple of 1/16 below the logarithm, which bf16 holds exactly up to a score of 16.
    """
    first = math.floor(16 * math.log(empty)) / 16
    rest = empty - math.exp(first)
    return first, math.log(rest) if rest > 0 else -math.inf


OPERATORS = SimpleNamespace(attend=attend, recall=recall, takes_bias=True, takes_own=True)
