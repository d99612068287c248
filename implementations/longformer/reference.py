"""Windowed and global attention, written out as two masked softmaxes (Beltagy et al. 2020, section 3.1).

B batch, H heads, T queries, S keys (the last T of them are the queries' own tokens), G global rows among the queries,
D head width. All scores are materialised: this is the oracle, not the fast path.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, scattered: Scattered, pattern: Pattern,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of the G global rows with their own projections, and of all other rows over band and global tokens.

    Args:
        q: ``[B, H, T, D]``; global rows are not used.
        k: ``[B, H, S, D]``, as ``v``.
        v: values.
        rows: queries ``[B, H, G, D]`` of the global rows and the keys and values they see.
        scattered: global tokens outside the prefix, as all other tokens see them.
        pattern: who sees whom.
        line: where there are no globals, what is added to the scores, by steps of the band: ``[H, Pattern.steps(S)]``.

    Returns:
        ``[B, H, T, D]``.
    """
    T, S = q.shape[2], k.shape[2]
    own = scattered.rows(T, S)
    G = rows.q.shape[2] - len(own)
    seen = visible(T - G, S, pattern, q.device)
    if scattered.at:  # keys of their own, and none of the band
        at = torch.tensor(scattered.at, device=q.device)
        seen[:, [place for place in scattered.at if place >= pattern.num_global]] = False
        earlier = at <= torch.arange(S - T + G, S, device=q.device)[:, None]
        seen = torch.cat((earlier if pattern.causal else torch.ones_like(earlier), seen), dim=1)
        k, v = torch.cat((scattered.k, k), dim=2), torch.cat((scattered.v, v), dim=2)
    bias = None if line is None else by_pair(line, T, S, pattern)
    head, local = everywhere(rows, pattern.causal), softmax_attention(q[:, :, G:], k, v, seen, bias)
    result = torch.cat((head[:, :, :G], local), dim=2)
    return result.index_copy(2, torch.tensor(own, device=q.device), head[:, :, G:]) if own else result


def visible(queries: int, S: int, pattern: Pattern, device: torch.device) -> torch.Tensor:
    """Which of S keys each of the last ``queries`` tokens sees in band and prefix: ``[queries, S]``."""
    query = torch.arange(S - queries, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    distance = query - key
    near = (distance <= pattern.left * pattern.dilation) & (distance >= -pattern.right * pattern.dilation)
    return (near & (distance % pattern.dilation == 0)) | (key < pattern.num_global)


def by_pair(line: torch.Tensor, T: int, S: int, pattern: Pattern) -> torch.Tensor:
    """The bias of each of the last T tokens and each of S keys, ``[H, T, S]``; pairs outside the band get any."""
    query, key = torch.arange(S - T, S, device=line.device)[:, None], torch.arange(S, device=line.device)
    step = (query - key).div(pattern.dilation, rounding_mode="floor") + min(pattern.right, S - 1)
    return line[:, step.clamp(0, line.shape[1] - 1)]


def everywhere(rows: GlobalRows, causal: bool) -> torch.Tensor:
    """Global rows over all tokens; in the causal form up to their own."""
    q, k, v, at = rows
    G, S = q.shape[2], k.shape[2]
    if G == 0:
        return q
    allowed = torch.ones(G, S, dtype=torch.bool, device=q.device)
    if causal:
        allowed = torch.arange(S, device=q.device) <= torch.tensor(at, device=q.device)[:, None]
    return softmax_attention(q, k, v, allowed)


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(q k^T / sqrt(D) + bias) v`` over the allowed keys."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(dim=3) @ v
