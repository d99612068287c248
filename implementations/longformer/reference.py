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
    G = rows.q.shape[2]
    local = softmax_attention(q[:, :, G:], k, v, visible(q.shape[2] - G, k.shape[2], pattern, q.device))
    return torch.cat((everywhere(rows, pattern.causal), local), dim=2)


def visible(queries: int, S: int, pattern: Pattern, device: torch.device) -> torch.Tensor:
    """Which of S keys each of the last ``queries`` tokens sees: ``[queries, S]``."""
    query = torch.arange(S - queries, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    distance = query - key
    near = (distance <= pattern.left * pattern.dilation) & (distance >= -pattern.right * pattern.dilation)
    return (near & (distance % pattern.dilation == 0)) | (key < pattern.num_global)


def everywhere(rows: GlobalRows, causal: bool) -> torch.Tensor:
    """Global rows over all tokens; in the causal form the last G of their keys are their own tokens."""
    G, S = rows.q.shape[2], rows.k.shape[2]
    allowed = torch.ones(G, S, dtype=torch.bool, device=rows.q.device)
    return softmax_attention(*rows, allowed.tril(S - G) if causal else allowed)


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D)) v`` over the allowed keys."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(dim=3) @ v
