"""Fused attention that keeps no scores, and one null slot in place of all empty ones.

B batch, H heads, n rows that ask, K keys of the window and its short-term memory, F filled slots, D head width.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention


class Attend(torch.autograd.Function):
    """Fused attention with a bias that learns: PyTorch's kernels give a bias no gradient, so scores are made again."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, blind: bool
    ) -> torch.Tensor:
        """As :func:`attend`; ``blind``: the first row sees no key."""
        ctx.save_for_backward(q, k, v, bias)
        ctx.blind = blind
        if not k.shape[2]:
            return torch.zeros_like(q)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias.detach()[None], scale=1.0)
        if blind:
            mixed[:, :, 0] = 0
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        scores = (q @ k.transpose(2, 3)).add_(bias)
        weights = scores.softmax(dim=3)
        del scores
        if ctx.blind:
            weights[:, :, 0] = 0
        by_v = weights.transpose(2, 3) @ grad
        by_weight = grad @ v.transpose(2, 3)
        by_score = torch._softmax_backward_data(by_weight, weights, 3, weights.dtype)
        del by_weight, weights
        return by_score @ k, by_score.transpose(2, 3) @ q, by_v, by_score.sum(dim=0), None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, ``bias: [H, n, K]``; a row that sees no key gets 0."""
    return Attend.apply(q, k, v, bias, k.shape[2] < q.shape[2])


def recall(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, empty: int) -> torch.Tensor:
    """``k, v: [B, H, F, D]`` and ``empty`` slots of zeros, all seen; no positions.

    A zero key has score 0 and value 0: ``empty`` of them add ``empty`` to the denominator and nothing else, and so
    does one with score ``log(empty)``.
    """
    if not k.shape[2]:
        return torch.zeros_like(q)
    if not empty:
        return scaled_dot_product_attention(q, k, v, scale=1.0)
    k, v = (pad(slots, (0, 0, 1, 0)) for slots in (k, v))
    score = torch.zeros(k.shape[2], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    score[0] = math.log(empty)
    return scaled_dot_product_attention(q, k, v, attn_mask=score.expand(q.shape[2], -1), scale=1.0)


OPERATORS = SimpleNamespace(attend=attend, recall=recall, takes_bias=True, takes_own=False)
