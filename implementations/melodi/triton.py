"""Attention by our kernels, and one null slot in closed form for all empty ones: no bias tensor, no padding.

B batch, H heads, n rows that ask, K keys of the window and its short-term memory, F filled slots, D head width.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``; the last row sees all keys, each row before it one less.

    ``bias``: a table ``[H, 2 F + 1]`` of distances, see ``ranges.attend``.
    """
    if bias is None and is_decoding(q, k, v):
        return decode(q, k, v, scale=1.0)[0]
    strictly_earlier = Range(k, v, high=Line(), start=0)
    return attend_ranges(q, [strictly_earlier], offset=k.shape[2] + 1 - q.shape[2], scale=1.0, bias=bias)[0]


def attend_apart(
    q: torch.Tensor, memory_k: torch.Tensor, memory_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The same where the window's own keys ``k, v: [B, H, n, D]`` are joined to nothing: all see what lies before."""
    before = memory_k.shape[2]
    own = Range(k, v, high=Line(base=-before), start=before)
    ranges = [Range(memory_k, memory_v, start=0), own] if before else [own]
    return attend_ranges(q, ranges, offset=before, scale=1.0, bias=bias)[0]


def recall(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, empty: int) -> torch.Tensor:
    """``k, v: [B, H, F, D]`` and ``empty`` slots of zeros, all seen; no positions.

    A zero key has score 0 and value 0: ``empty`` of them leave of the result the part ``e^lse / (e^lse + empty)``.
    """
    if not k.shape[2]:
        return torch.zeros_like(q)
    few = is_decoding(q, k, v)
    out, lse = decode(q, k, v, causal=False, scale=1.0) if few else attend_ranges(q, [Range(k, v)], scale=1.0)
    if not empty:
        return out
    return out * torch.sigmoid(lse - math.log(empty))[..., None].to(out.dtype)


OPERATORS = SimpleNamespace(attend=attend, attend_apart=attend_apart, recall=recall, takes_bias=False, takes_own=False)
