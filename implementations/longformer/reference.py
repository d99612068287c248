"""Windowed and global attention, written out as two masked softmaxes (Beltagy et al. 2020, section 3.1).

B batch, H heads, T queries, S keys (the last T of them are the queries' own tokens), G global rows among the queries,
D head width. All scores are materialised: this is the oracle, not the fast path.
"""

from __future__ import annotations

import torch

from ctxbench.implementations.longformer.layer import GlobalRows
from ctxbench.implementations.longformer.params import Pattern


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, pattern: Pattern) -> torch.Tensor:
    """Attention of the G global rows with their own projections, then of all other rows over band and prefix.

    Args:
        q: ``[B, H, T, D]``; the first G rows are not used.
        k: ``[B, H, S, D]``, as ``v``.
        v: values.
        rows: queries ``[B, H, G, D]`` of the global rows and the keys and values they see.
        pattern: who sees whom.

    Returns:
        ``[B, H, T, D]``.
    """
    T, S, G = q.shape[2], k.shape[2], rows.q.shape[2]
    query = torch.arange(S - T + G, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)
    distance = query - key
    near = (distance <= pattern.left * pattern.dilation) & (distance >= -pattern.right * pattern.dilation)
    visible = (near & (distance % pattern.dilation == 0)) | (key < pattern.num_global)
    return torch.cat((everywhere(rows, pattern.causal), softmax_attention(q[:, :, G:], k, v, visible)), dim=2)


def everywhere(rows: GlobalRows, causal: bool) -> torch.Tensor:
    """Global rows over all tokens; in the causal form the last G of their keys are their own tokens."""
    G, S = rows.q.shape[2], rows.k.shape[2]
    visible = torch.ones(G, S, dtype=torch.bool, device=rows.q.device)
    return softmax_attention(*rows, visible.tril(S - G) if causal else visible)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D)) v`` over the visible keys."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=3) @ v
