"""All segments in one call of FlexAttention: the position term is one product, read by each score at its distance.

The term is ``[B, H, T, N]`` for the N distances of a segment and its memory, so that it grows with T alone. Memory rows
pass gradients to weights and none to a layer's input; with gradients they are therefore a copy of keys and values in
front of the segments' own, and one projection makes both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.lines import Line


def attend(layer: Any, x: torch.Tensor, past: torch.Tensor, phase: int) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; as in the reference, where ``phase`` is 0."""
    H, S, M, known = layer.num_heads, layer.params.segment_len, layer.params.mem_len, past.shape[1]
    last = (x.shape[1] - 1) // S * S  # begin of the last segment
    longest = max(min(max(last - S, 0) + known, M) + min(S, x.shape[1]), min(last + known, M) + x.shape[1] - last)
    q = split_heads(layer.q(x), H)
    if torch.is_grad_enabled():
        front = known + last if M else 0  # rows that a later segment may see
        k, v = (split_heads(MemoryAndOwn.apply(x, past, w, front), H) for w in (layer.k.weight, layer.v.weight))
        seen = [flex.Between(Line(S, S), Line(base=1), front, x.shape[1])]
        if front:
            seen.append(flex.Between(Line(S, S, base=known - M), Line(S, S, base=known), 0, front))
    else:
        front = known
        k, v = (split_heads(project(torch.cat((past, x), dim=1) if known else x), H) for project in (layer.k, layer.v))
        seen = [flex.Between(Line(S, S, base=known - M), Line(base=known + 1))]
    r = layer.r(layer.table[:longest]).unflatten(1, (H, -1)).permute(1, 2, 0)  # [H, D, N]
    term = (q + layer.position_bias[:, None]) @ r * layer.head_dim**-0.5
    return merge_heads(flex.attend(q + layer.content_bias[:, None], k, v, seen, score=by_distance(term, known, front)))


def by_distance(term: torch.Tensor, known: int, front: int) -> flex.Score:
    """``term: [B, H, T, N]`` at the distance from a key back to its query.

    The first token is key ``front``, and key ``known`` of those in front of it.
    """
    farthest = term.shape[3] - 1

    def score(value: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        back = row - key + (known if known == front else torch.where(key < front, known, front))
        return value + term[b, h, row, back.clamp(0, farthest)]

    return score


class MemoryAndOwn(torch.autograd.Function):
    """Projected rows ``[B, front + T, d]``: the first ``front`` of ``past`` and ``x``, then all of ``x``.

    The first ones pass their gradients to the weight alone.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, past: torch.Tensor, weight: torch.Tensor, front: int) -> torch.Tensor:
        ctx.save_for_backward(x, past, weight)
        ctx.front = front
        known = past.shape[1]
        projected = linear(torch.cat((past, x), dim=1) if known else x, weight)
        return torch.cat((projected[:, :front], projected[:, known:]), dim=1) if front else projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, past, weight = ctx.saved_tensors
        known = past.shape[1]
        own = grad[:, ctx.front :]
        rows, summed = x, own
        if ctx.front:
            rows = torch.cat((past, x), dim=1) if known else x
            summed = torch.cat((torch.zeros_like(past), own), dim=1)
            summed[:, : ctx.front] += grad[:, : ctx.front]
        return own @ weight, None, summed.flatten(0, 1).T @ rows.flatten(0, 1), None
