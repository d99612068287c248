"""Transformer-XL as published: segment after segment, each with its memory (Dai et al. 2019, sections 3.2 and 3.3).

B batch, H heads, n queries of a segment, K keys (memory and segment), D head width, M mem_len.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``.

    Args:
        layer: weights of :class:`..layer.RelativeAttention`.
        x: inputs of the layer, ``[B, T, d_model]``; they begin ``phase`` tokens into a segment.
        past: inputs before them, as many as the state keeps, ``[B, R, d_model]``.
        phase: tokens of the current segment that are in ``past`` already.
    """
    S, M = layer.params.segment_len, layer.params.mem_len
    known, T = past.shape[1], x.shape[1]
    stream = torch.cat((past, x), dim=1)
    outputs = []
    for begin in range(-phase, T, S):
        first, end = max(begin, 0), min(begin + S, T)
        oldest = max(begin - M, -known)
        memory = stream[:, known + oldest : known + first].detach()
        outputs.append(attend_segment(layer, x[:, first:end], memory))
    return torch.cat(outputs, dim=1)


def attend_segment(layer: Any, segment: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Queries from the segment, keys and values from memory and segment; ``[B, n, d_model]``."""
    context = torch.cat((memory, segment), dim=1)
    n, K = segment.shape[1], context.shape[1]
    q = split_heads(layer.q(segment), layer.num_heads)  # [B, H, n, D]
    k = split_heads(layer.k(context), layer.num_heads)  # [B, H, K, D]
    v = split_heads(layer.v(context), layer.num_heads)
    r = split_heads(layer.r(layer.table[:K])[None], layer.num_heads)  # [1, H, K, D], row = distance

    row = torch.arange(n, device=q.device)[:, None]
    column = torch.arange(K, device=q.device)
    distance = K - n + row - column  # [n, K], negative where the key is in the future
    visible = distance >= 0
    if layer.params.same_length:
        visible &= distance < layer.params.mem_len

    content = (q + layer.content_bias[:, None]) @ k.transpose(2, 3)  # [B, H, n, K], column = key
    position = (q + layer.position_bias[:, None]) @ r.transpose(2, 3)  # [B, H, n, K], column = distance
    position = position.gather(3, distance.clamp(min=0).expand_as(position))  # column = key
    scores = (content + position) * layer.head_dim**-0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    return merge_heads(scores.softmax(dim=3) @ v)
