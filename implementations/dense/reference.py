"""Scaled dot-product attention, written out (Vaswani et al. 2017, equation 1).

B batch, H heads, T queries, S keys (the last T of them are the queries' own tokens), D head width.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Position, RelativeTerm


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D) + bias) v``; ``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``."""
    T, S = q.shape[2], k.shape[2]
    if isinstance(position, RelativeTerm):
        scores = relative_scores(q, k, causal, position)
    else:
        scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, T, S]
        bias = position.rectangle(T, S, S - T, like=q)
        if bias is not None:
            scores = scores + bias
    if causal:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=3) @ v


def relative_scores(q: torch.Tensor, k: torch.Tensor, causal: bool, term: RelativeTerm) -> torch.Tensor:
    """``[(q + u) k^T + (q + v) r_(i - j)] / sqrt(D)``, ``[B, H, T, S]``; distances below 0 only where not causal."""
    T, S = q.shape[2], k.shape[2]
    r = term.keys(S - 1, 0 if causal else 1 - T)  # [H, distances, D], column 0 is the farthest
    column = torch.arange(S, device=q.device) + torch.arange(T - 1, -1, -1, device=q.device)[:, None]
    content = (q + term.content_bias[:, None]) @ k.transpose(2, 3)
    by_distance = (q + term.position_bias[:, None]) @ r.transpose(1, 2)
    column = column.clamp(max=r.shape[1] - 1)  # beyond it are later keys, which the caller hides
    return (content + by_distance.gather(3, column.expand_as(content))) * q.shape[3] ** -0.5
