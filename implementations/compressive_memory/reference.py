"""Segment after segment, in the order of the equations (README); all scores are kept.

B batch, H heads, m queries of a piece of a segment, K keys (retrieved rows and the segment so far), D head width.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations.compressive_memory.layer import State, kept


def attend(layer: Any, x: torch.Tensor, state: State, keep: bool) -> tuple[torch.Tensor, State | None]:
    """Heads merged, before the output projection, ``[B, T, d_model]``; and the state after ``x`` where it is wanted.

    Args:
        layer: weights of :class:`..layer.CompressiveMemory`.
        x: inputs of the layer after its norm, ``[B, T, d_model]``.
        state: before ``x``, which may begin and end inside a segment.
        keep: whether the state after ``x`` is wanted.
    """
    S, outputs = layer.params.segment_len, []
    while x.shape[1]:
        room = S - state.tokens % S
        piece, x = x[:, :room], x[:, room:]
        out, state = attend_piece(layer, piece, state)
        outputs.append(out)
        if state.tokens % S == 0 and (keep or x.shape[1]):  # else nobody would read what is retrieved
            state = layer.turn(state)
    return torch.cat(outputs, dim=1), kept(state) if keep else None


def attend_piece(layer: Any, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """Consecutive tokens of one segment, ``[B, m, d_model]``, and the state with them."""
    q, own_k, own_v = (split_heads(project(x), layer.num_heads) for project in (layer.q, layer.k, layer.v))
    fill = state.tokens % layer.params.segment_len
    q, own_k = layer.position.rotate(q, fill), layer.position.rotate(own_k, fill)
    k, v = torch.cat((state.k, own_k), dim=2), torch.cat((state.v, own_v), dim=2)
    m, K = q.shape[2], k.shape[2]
    future = torch.ones(m, K, dtype=torch.bool, device=x.device).triu(K - m + 1)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # [B, H, m, K]
    if state.places is not None:  # distances of each batch row's own choice, and of its own tokens
        own = torch.arange(fill + m, device=x.device)
        places = torch.cat((state.places, own.expand(len(x), -1)), dim=1)
        bias = layer.position.bias(places[:, None] - own[fill:, None], q.dtype)  # [H, B, m, K]
        scores = scores + bias.transpose(0, 1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(dim=3) @ v
    recent = torch.cat((state.recent, x.detach()), dim=1)
    return merge_heads(mixed), State(state.compressed, recent, k, v, state.places, state.tokens + m)
