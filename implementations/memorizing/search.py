"""Exact top-k attention over the memory in Triton: scores live in a tile, and only what was picked is written.

A tile of queries runs over its memory once, with the best TOP keys so far of every row in registers. From a tile of
scores the best of each row enters, pushing out the worst, until no row has anything better than its worst: after the
first tiles that is a step or two. Of equal scores the older key stays, whatever their order in a tile. Then the picked
values are gathered, and the backward pass gathers values and keys again. The memory has no gradient.

X = B H heads, T queries, N keys, D head width. Queries come in segments of ``length``; segment t sees the last ``most``
keys before number ``past + t length``.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.flash_rows import _dot, _load, _store
from ctxbench.implementations._shared.flash_softmax import LOG2_E
from ctxbench.implementations._shared.flash_table import padded
from ctxbench.implementations._shared.ranges import _rows, _strides
from ctxbench.implementations.memorizing.sizes import pairs

GATHERING = 32  # queries whose picked rows are gathered together in the backward pass
# Channels and pairs, padded, of which tiles of 32 keys spill in float32, compiled by triton 3.6; those of 64 do not.
SPILLING = ((16, 128), (32, 32))
SHORT = 256  # bytes of a row, its padding included, that four warps hold beside what queries keep


def warps(width: int, itemsize: int) -> int:
    """Of a tile of queries: twice as many where rows are long."""
    return 4 if padded(width) * itemsize <= SHORT else 8


def keys(top_k: int, width: int, itemsize: int) -> int:
    """Keys of a tile of scores: in float32 half as many, but where that would spill."""
    return 32 if itemsize == 4 and (padded(width), padded(top_k)) not in SPILLING else 64


def queries(top_k: int, width: int, itemsize: int) -> int:
    """Queries of a tile: what they keep of scores and numbers fills at most 16 registers a thread, in float32 8."""
    return max(16, 1024 // padded(top_k)) if itemsize == 2 and warps(width, itemsize) == 4 else 16


@triton.jit
def search_kernel(
    Q, K, V, OUT, PICKED, WEIGHTS, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, heads, T, N, past, length, most, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TOP: tl.constexpr, KEPT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Output, and numbers and weights of what was picked, of one tile of queries. Grid: tiles of all segments, X."""
    tiles = tl.cdiv(length, ROWS)
    segment = tl.program_id(0) // tiles
    start = segment * length + tl.program_id(0) % tiles * ROWS
    stop = tl.minimum(T, (segment + 1) * length)
    if start >= stop:
        return
    end = tl.minimum(past + segment * length, N)
    begin = tl.maximum(end - most, 0)
    head = tl.program_id(1).to(tl.int64)
    K += head // heads * k_batch + head % heads * k_head
    V += head // heads * v_batch + head % heads * v_head

    q = _load(Q + head // heads * q_batch + head % heads * q_head, start, q_row, stop, ROWS, D, WIDTH)
    slot, column = tl.arange(0, KEPT)[None, :], tl.arange(0, COLUMNS)
    values = tl.zeros([ROWS, KEPT], tl.float32) + tl.where(slot < TOP, float("-inf"), float("inf"))
    numbers = tl.zeros([ROWS, KEPT], tl.int32) + slot
    worst = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(begin, end, COLUMNS):
        k = _load(K, first, k_row, end, COLUMNS, D, WIDTH)
        scores = tl.where((first + column)[None, :] < end, _dot(q, tl.trans(k)), float("-inf"))
        best, at = tl.max(scores, 1, return_indices=True)
        while tl.max((best > worst).to(tl.int32), 0) > 0:
            last = tl.max(tl.where(values == worst[:, None], numbers, -1), 1)  # the newest of the worst
            leaves = (values == worst[:, None]) & (numbers == last[:, None]) & (best > worst)[:, None]
            values = tl.where(leaves, best[:, None], values)
            numbers = tl.where(leaves, (first + at)[:, None], numbers)
            worst = tl.min(values, 1)
            scores = tl.where(column[None, :] == at[:, None], float("-inf"), scores)
            best, at = tl.max(scores, 1, return_indices=True)

    values = tl.where(slot < TOP, values, float("-inf"))
    top = tl.max(values, 1)
    p = tl.exp2((values - tl.where(top == float("-inf"), 0.0, top)[:, None]) * LOG2_E)
    total = tl.sum(p, 1)
    p = p / tl.where(total == 0.0, 1.0, total)[:, None]  # an empty memory answers 0
    row, channel = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    if KEEP:
        place = (head * T + row)[:, None] * TOP + slot
        there = (row < stop)[:, None] & (slot < TOP)
        tl.store(PICKED + place, numbers, mask=there)
        tl.store(WEIGHTS + place, p.to(WEIGHTS.dtype.element_ty), mask=there)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(0, TOP):
        weight, number = tl.sum(tl.where(slot == i, p, 0.0), 1), tl.sum(tl.where(slot == i, numbers, 0), 1)
        mask = (weight > 0.0)[:, None] & (channel[None, :] < D)
        v = tl.load(V + number.to(tl.int64)[:, None] * v_row + channel[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * v.to(tl.float32)
    _store(OUT + head // heads * o_batch + head % heads * o_head, start, o_row, stop, acc, ROWS, D, WIDTH)


@triton.jit
def gradient_kernel(
    K, V, OUT, GRAD, PICKED, WEIGHTS, DQ, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, dq_batch, dq_head, dq_row, heads, T, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries. Grid: tiles of queries, X."""
    start, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    K += head // heads * k_batch + head % heads * k_head
    V += head // heads * v_batch + head % heads * v_head
    row, channel = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    grad = _load(GRAD + head // heads * g_batch + head % heads * g_head, start, g_row, T, ROWS, D, WIDTH)
    out = _load(OUT + head // heads * o_batch + head % heads * o_head, start, o_row, T, ROWS, D, WIDTH)
    grad = grad.to(tl.float32)
    delta = tl.sum(grad * out.to(tl.float32), 1)
    place = (head * T + row) * TOP
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in range(0, TOP):
        weight = tl.load(WEIGHTS + place + i, mask=row < T, other=0.0).to(tl.float32)
        number = tl.load(PICKED + place + i, mask=row < T, other=0).to(tl.int64)[:, None]
        mask = (weight > 0.0)[:, None] & (channel[None, :] < D)
        v = tl.load(V + number * v_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.load(K + number * k_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += (weight * (tl.sum(grad * v, 1) - delta))[:, None] * k
    _store(DQ + head // heads * dq_batch + head % heads * dq_head, start, dq_row, T, acc, ROWS, D, WIDTH)


@torch.library.custom_op("ctxbench::search", mutates_args=())
def search(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, past: int, length: int, most: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of ``q: [B, H, T, D]`` over its ``top_k`` best keys, scores unscaled.

    Args:
        q: queries, segment after segment.
        k: ``[B, H, N, D]``.
        v: the same shape as ``k``.
        top_k: keys a query picks; all where its memory has fewer.
        past: keys before the first segment's.
        length: queries of a segment.
        most: the last keys before a segment that it sees.
        keep: whether the backward pass will ask what was picked.

    Returns:
        Output like ``q``; numbers ``[X, T, top_k]`` in int32 of the picked keys and their weights in the dtype of q,
        if they are to be kept. Where fewer were there, the weights of the others are 0.
    """
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, picked, weights = _results(q, top_k if keep else 0)
    B, H, T, D = q.shape
    length = min(length, T)  # a segment that never ends has no more tiles than queries
    rows = queries(top_k, D, q.element_size())
    grid = triton.cdiv(T, length) * triton.cdiv(length, rows), B * H
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
        search_kernel[grid](
            q, k, v, out, picked, weights, *_strides(q, k, v, out), H, T, k.shape[2], past, length, most, D=D,
            WIDTH=padded(D), ROWS=rows, COLUMNS=keys(top_k, D, q.element_size()), TOP=top_k, KEPT=padded(top_k),
            KEEP=keep, num_warps=warps(D, q.element_size()), num_stages=2,
        )  # fmt: skip
    return out, picked, weights


@torch.library.custom_op("ctxbench::search_backward", mutates_args=())
def search_backward(
    grad: torch.Tensor, out: torch.Tensor, k: torch.Tensor, v: torch.Tensor, picked: torch.Tensor,
    weights: torch.Tensor, past: int, length: int, most: int,
) -> torch.Tensor:  # fmt: skip
    """Gradient of the queries, ``[B, H, T, D]``."""
    grad, k, v = _rows(grad), _rows(k), _rows(v)
    B, H, T, D = out.shape
    dq = torch.empty_like(out)
    with torch.cuda.device_of(out):
        gradient_kernel[triton.cdiv(T, GATHERING), B * H](
            k, v, out, grad, picked, weights, dq, *_strides(k, v, out, grad, dq), H, T, D=D, WIDTH=padded(D),
            ROWS=GATHERING, TOP=picked.shape[2], num_warps=4,
        )  # fmt: skip
    return dq


def _results(q: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D).transpose(1, 2)  # heads side by side, so that merging them is free
    return out, q.new_empty(B * H, T, top_k, dtype=torch.int32), q.new_empty(B * H, T, top_k)


@search.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, top_k: int, *rest: Any) -> Any:
    return _results(q, top_k if rest[-1] else 0)


@search_backward.register_fake
def _(grad: torch.Tensor, out: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(out)


@formula(torch.ops.ctxbench.search)
def _search_flops(
    q: Any, k: Any, v: Any, top_k: int, past: int, length: int, most: int, keep: bool, **_: Any
) -> int:  # fmt: skip
    """Every score, and the values of what is picked."""
    B, H, T, D = q.shape
    each = (pairs(T, k.shape[2], past, length, limit) for limit in (most, min(most, top_k)))
    return int(2 * B * H * D * sum(each))


@formula(torch.ops.ctxbench.search_backward)
def _search_backward_flops(
    grad: Any, out_: Any, k: Any, v: Any, picked: Any, weights: Any, past: int, length: int, most: int, **_: Any
) -> int:
    """Gradients of the weights and of the queries, over what was picked."""
    B, H, T, D = out_.shape
    return int(4 * B * H * D * pairs(T, k.shape[2], past, length, min(most, picked.shape[2])))


class Search(torch.autograd.Function):
    """``search`` with its gradient: :func:`search` says what goes in; out comes ``[B, H, T, D]``."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: int) -> torch.Tensor:
        out, picked, weights = search(q, k, v, *rest)
        ctx.save_for_backward(out, k, v, picked, weights)
        ctx.rest = rest[1:4]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return search_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 7
