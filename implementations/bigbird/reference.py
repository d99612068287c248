"""Block-sparse attention as one masked softmax (Zaheer et al. 2020, section 2): the oracle, not the fast path."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations.bigbird.layer import Plan


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, position: Position | None = None
) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape; all scores are materialised."""
    hidden = ~visible(plan, q.shape[2])
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if isinstance(position, Bias):
        scores = scores + position.rectangle(q.shape[2], q.shape[2], 0, like=q)
    scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=3) @ v


def visible(plan: Plan, T: int) -> torch.Tensor:
    """Which tokens each token sees, head by head: ``[H, T, T]``."""
    H, n = plan.edges.shape[0], plan.num_blocks
    seen = torch.zeros(H, n, n, dtype=torch.bool, device=plan.edges.device)
    seen[:, 0] = seen[:, n - 1] = True
    if n > 2:
        seen[:, 1 : n - 1 : max(1, n - 3)].scatter_(2, plan.edges, True)
    if n > 4:
        seen[:, 2 : n - 2].scatter_(2, plan.inner, True)
    by_token = torch.arange(T, device=seen.device) // plan.size
    return seen[:, by_token[:, None], by_token]
