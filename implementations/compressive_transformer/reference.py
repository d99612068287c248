"""The Compressive Transformer as published: a loop over segments (Rae et al. 2019, section 3.1 and algorithm 1).

B batch, H heads, n queries of a segment, K keys (compressed entries, memory, segment), D head width.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads


def attend(layer: Any, x: torch.Tensor, state: Any, keep: bool) -> tuple[torch.Tensor, Any]:
    """Heads merged, before the output projection, ``[B, T, d_model]``; and the state after ``x``.

    Args:
        layer: weights of :class:`..layer.CompressiveAttention`.
        x: inputs of the layer, ``[B, T, d_model]``.
        state: before ``x``, which may begin and end inside a segment.
        keep: whether the state after ``x`` is wanted; else None is returned.
    """
    S, T = layer.params.segment_len, x.shape[1]
    outputs = []
    for begin in range(-state.phase, T, S):
        segment = x[:, max(begin, 0) : begin + S]
        out, usage = attend_segment(layer, segment, state)
        outputs.append(out)
        if begin + S < T or keep:
            state = layer.advance(state, segment, usage)
    return torch.cat(outputs, dim=1), state if keep else None


def attend_segment(layer: Any, segment: torch.Tensor, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries from the segment, keys and values from all: ``[B, n, d_model]``; and the usage of memory and segment."""
    context = torch.cat((state.compressed, state.hidden, segment), dim=1)
    n, K = segment.shape[1], context.shape[1]
    q = split_heads(layer.q(segment), layer.num_heads)  # [B, H, n, D]
    k = split_heads(layer.k(context), layer.num_heads)  # [B, H, K, D]
    v = split_heads(layer.v(context), layer.num_heads)
    r = split_heads(layer.r(layer.table[:K])[None], layer.num_heads)  # [1, H, K, D], row = distance

    row = torch.arange(n, device=q.device)[:, None]
    column = torch.arange(K, device=q.device)
    distance = K - n + row - column  # [n, K], along the concatenation; negative where the key is in the future

    content = (q + layer.content_bias[:, None]) @ k.transpose(2, 3)  # [B, H, n, K], column = key
    position = (q + layer.position_bias[:, None]) @ r.transpose(2, 3)  # [B, H, n, K], column = distance
    position = position.gather(3, distance.clamp(min=0).expand_as(position))  # column = key
    scores = (content + position) * layer.head_dim**-0.5
    scores = scores.masked_fill(distance < 0, float("-inf"))
    weights = scores.softmax(dim=3)

    usage = state.usage
    if layer.counts_usage:
        seen = weights.detach().sum(dim=(1, 2), dtype=usage.dtype)[:, state.compressed.shape[1] :]
        usage = torch.cat((usage + seen[:, : usage.shape[1]], seen[:, usage.shape[1] :]), dim=1)
    return merge_heads(weights @ v), usage
