"""Lookups and the window in C++: no scores leave the caches, and nothing that is picked is gathered.

``native.cpp`` visits all keys that a query may pick and reads the values of those it picks. The window is the shared
kernel over ranges of keys. That has no backward pass: where gradients are asked for, the window is that of
``blocked``, and the lookup keeps what was picked. X = B H, n queries, m pairs in memory, K retrieved, D head width.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.biased_window import attend_blocks
from ctxbench.implementations._shared.native import function, integers
from ctxbench.implementations.memorizing import windows
from ctxbench.implementations.memorizing.blocked import gradient
from ctxbench.implementations.memorizing.layer import Operators
from ctxbench.implementations.memorizing.sizes import FEW, PANEL, pairs

SOURCE = Path(__file__).with_suffix(".cpp")


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The last W keys of every query; ``bias: [H, W]`` is 0."""
    return (attend_blocks if torch.is_grad_enabled() else windows.window)(q, k, v, bias)


def biased_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same with ``bias: [H, W]`` by distance."""
    return (attend_blocks if torch.is_grad_enabled() else windows.biased_window)(q, k, v, bias)


def lookup(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, m, D]``, result ``[B, H, n, D]``; ``top_k`` keys a query, all for None."""
    n, m = q.shape[2], k.shape[2]
    if top_k is None or top_k >= m:
        return scaled_dot_product_attention(q, k, v, scale=1.0)
    mixed: torch.Tensor = _TopK.apply(q, k, v, top_k, m, n, m, torch.is_grad_enabled())
    return mixed


def whole(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int | None, segment_len: int, memory_len: int
) -> torch.Tensor:
    """All segments of a call at once; the first few may have no more in memory than they pick."""
    k, v = k.detach(), v.detach()
    if top_k is None or top_k >= memory_len:
        return _everything(q, k, v, segment_len, memory_len)
    few = top_k // segment_len * segment_len + segment_len
    rest = top_k, 0, segment_len, memory_len, torch.is_grad_enabled()
    if few == segment_len:  # these have nothing
        found: torch.Tensor = _TopK.apply(q, k, v, *rest)
        return found
    found = _everything(q[:, :, :few], k, v, segment_len, memory_len)
    if q.shape[2] <= few:
        return found
    return torch.cat((found, _TopK.apply(q[:, :, few:], k, v, top_k, few, *rest[2:])), dim=2)


def _everything(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment_len: int, memory_len: int) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return windows.everything(q, k, v, segment_len, memory_len)
    first, *parts = q.split(segment_len, dim=2)
    found = [torch.zeros_like(first)]
    for number, part in enumerate(parts, 1):
        seen = slice(max(0, number * segment_len - memory_len), number * segment_len)
        found.append(scaled_dot_product_attention(part, k[:, :, seen], v[:, :, seen], scale=1.0))
    return torch.cat(found, dim=2)


class _TopK(torch.autograd.Function):
    """Gradients for the queries alone: the memory is not differentiable. See :func:`retrieve` for the arguments."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, known: int, segment: int, most: int,
        keep: bool,
    ) -> torch.Tensor:  # fmt: skip
        B, H, n, _ = q.shape
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        chosen = q.new_empty(B * H, n, top_k, dtype=torch.int32) if keep else None
        weights = q.new_empty(B * H, n, top_k) if keep else None
        retrieve(q, k, v, known, segment, most, top_k, out, weights, chosen)
        if keep:
            ctx.save_for_backward(k, v, chosen, weights)
            ctx.empty = 0 if known else segment  # queries that have nothing to pick
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        k, v, chosen, weights = ctx.saved_tensors
        dq, rows = torch.zeros_like(grad), slice(ctx.empty, None)
        if chosen[:, rows].numel():
            above, k, v = (x.flatten(0, 1) for x in (grad[:, :, rows], k, v))
            dq[:, :, rows] = gradient(above, k, v, chosen[:, rows], weights[:, rows]).unflatten(0, grad.shape[:2])
        return dq, *(None,) * 7


def retrieve(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, known: int, segment: int, most: int, top_k: int,
    out: torch.Tensor, weights: torch.Tensor | None = None, chosen: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Fill ``out`` with the attention of every query over its ``top_k`` best keys, scores unscaled.

    Of equal scores the oldest keys are picked; NaN is larger than any number, as for ``topk``.

    Args:
        q: ``[B, H, n, D]``, segment after segment.
        k: ``[B, H, m, D]``.
        v: the same shape as ``k``.
        known: keys before the first segment's.
        segment: queries of a segment.
        most: the last keys before a segment that it sees: none, or more than ``top_k``.
        top_k: keys a query picks.
        out: like ``q``.
        weights: ``[X, n, top_k]``, receives the shares of what was picked, where they are wanted.
        chosen: the same shape, int32, receives the numbers of the keys, which ascend.
    """
    panels = 0 if q.shape[2] <= FEW else -(-k.shape[2] // PANEL)
    wide = torch.promote_types(k.dtype, torch.float32)
    packed = k.new_empty(panels * PANEL * k.shape[3], dtype=wide)  # of a head
    torch.ops.ctxbench.retrieve(q, k, v, known, segment, most, top_k, packed, out, weights, chosen)


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    sizes = ctypes.POINTER(ctypes.c_int64)
    return function(SOURCE, "retrieve", dtype, *[ctypes.c_void_p] * 7, sizes, sizes, ctypes.c_int)


_LIBRARY = torch.library.Library("ctxbench", "FRAGMENT")
_LIBRARY.define(
    "retrieve(Tensor q, Tensor k, Tensor v, int known, int segment, int most, int top_k, Tensor(a!) packed, "
    "Tensor(b!) out, Tensor(c!)? weights, Tensor(d!)? chosen) -> ()"
)


@torch.library.impl(_LIBRARY, "retrieve", "CPU")
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, known: int, segment: int, most: int, top_k: int,
    packed: torch.Tensor, out: torch.Tensor, weights: torch.Tensor | None, chosen: torch.Tensor | None,
) -> None:  # fmt: skip
    (B, H, n, D), m = q.shape, k.shape[2]
    fewest = min(known, most) or min(segment, most)
    if not 1 <= top_k <= fewest or known + (n - 1) // segment * segment > m or m >= 1 << 31:
        raise ValueError(
            f"expected no keys or at least top_k = {top_k} before a segment, and less than 2^31, received {known} "
            f"before the first of {segment} queries, {most} at most, of {m}"
        )
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    strides = [step for x in (q, k, v, out) for step in x.stride()[:3]]
    kept = (None if x is None else x.data_ptr() for x in (weights, chosen))
    _function(q.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), packed.data_ptr() or None, out.data_ptr(), *kept, integers(strides),
        integers((B, H, n, m, D, top_k, known, segment, most)), torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("ctxbench::retrieve")
def _(*_: Any) -> None:
    return None


@formula(torch.ops.ctxbench.retrieve)
def _flops(q: Any, k: Any, v: Any, known: int, segment: int, most: int, top_k: int, *_: Any, **__: Any) -> int:
    """Every score, and the values of what is picked."""
    B, H, n, D = q.shape
    return int(2 * B * H * D * sum(pairs(n, k.shape[2], known, segment, limit) for limit in (most, min(most, top_k))))


OPERATORS = Operators(window, lookup, whole, biased_window)
