"""Attention of one or a few queries to a long cache, in Triton: the keys are split over the device.

A block of the flash kernels holds a tile of queries and walks along all keys: for one query that is one busy
multiprocessor a head. Here every block takes a part of the keys; a second, small kernel merges the parts by their
log-sum-exp (Dao et al. 2023, Flash-Decoding). Queries that share a head of keys (grouped queries, Ainslie et al. 2023)
are rows of one tile, so that keys are read once for all of them.

The cache is a tensor whose rows are keys in their order, or a ring: its first ``sinks`` rows stay where they are, the
others are overwritten in turn and the oldest of them lies at ``start``. Nothing is moved or copied. Forward only.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.decode_table import FEW, WIDEST, chunk, config, visible_pairs
from ctxbench.implementations._shared.flash_table import chunk as chunk_of_channels
from ctxbench.implementations._shared.flash_table import padded

LOG2_E = tl.constexpr(1.4426950408889634)
PARTS = 16  # parts that one step of the merge takes


@triton.jit
def _channels(base, rows, there, channel, D: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK channels from one on of the rows that begin at ``rows``, zero where none is there and beyond D."""
    column = channel + tl.arange(0, CHUNK)
    return tl.load(base + rows[:, None] + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["keys", "start", "chunk"])
def partial_kernel(
    Q, K, V, OUT, LSE, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_part, o_batch, o_head, o_row, heads, T, capacity, keys, start, sinks, chunk, scale,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp over ``chunk`` keys. Grid: parts of the keys, batch x heads of keys, tiles of queries.

    Row r of a tile is query ``r // GROUP`` in the r-th of the GROUP heads that share these keys.
    """
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, keys)
    batch, of_keys = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, of_keys * GROUP + row % GROUP
    column, there = tl.arange(0, WIDTH), row < T * GROUP

    query = batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head + token * q_row
    if CHUNK == WIDTH:
        q = _channels(Q, query, there, 0, D, WIDTH)
    K += batch.to(tl.int64) * k_batch + of_keys.to(tl.int64) * k_head
    V += batch.to(tl.int64) * v_batch + of_keys.to(tl.int64) * v_head
    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum and sum, in units of base 2
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    to_base_2 = scale * LOG2_E
    for at in range(first, last, COLUMNS):
        key = at + tl.arange(0, COLUMNS)
        place = key
        if RING:  # the order of the keys, wrapped around behind the sinks
            place = tl.where(key < sinks, key, sinks + (key - sinks + start) % (capacity - sinks))
        place = place.to(tl.int64)
        if CHUNK == WIDTH:
            k = _channels(K, place * k_row, key < last, 0, D, WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        else:  # see ``flash_rows``
            scores = tl.zeros([ROWS, COLUMNS], tl.float32)
            for channel in range(0, WIDTH, CHUNK):
                some = _channels(Q, query, there, channel, D, CHUNK)
                k = _channels(K, place * k_row, key < last, channel, D, CHUNK)
                scores += tl.dot(some, tl.trans(k), input_precision="tf32x3")
        seen = (key < last)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= (keys - T + token)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * to_base_2)
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: keep inf - inf out
        p = tl.exp2(scores * to_base_2 - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        v = _channels(V, place * v_row, key < last, 0, D, WIDTH)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
        top = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    written = tl.program_id(0).to(tl.int64) * o_part + batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head
    written += token * o_row
    inside = there[:, None] & (column < D)[None, :]
    tl.store(OUT + written[:, None] + column[None, :], acc.to(OUT.dtype.element_ty), mask=inside)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(LSE + (part * GROUP + row % GROUP) * T + token, lse, mask=there)


@triton.jit
def merge_kernel(
    PARTIAL, PARTIAL_LSE, OUT, LSE, o_batch, o_head, o_row, heads, T, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One query from its ``parts`` partial outputs, ``[parts, rows, D]``. Grid: rows, batch x heads x queries."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    top, total = float("-inf"), 0.0
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        lse = tl.load(PARTIAL_LSE + part * rows + row, mask=part < parts, other=float("-inf")) * LOG2_E
        at = (part * rows + row)[:, None] * D + column[None, :]
        out = tl.load(PARTIAL + at, mask=(part < parts)[:, None] & (column < D)[None, :], other=0.0)
        higher = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight, shrink = tl.exp2(lse - shift), tl.exp2(top - shift)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(out * weight[:, None], 0)
        top = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)
    batch, head, token = row // T // heads, row // T % heads, row % T
    OUT += batch * o_batch + head * o_head + token * o_row
    tl.store(OUT + column, acc.to(OUT.dtype.element_ty), mask=column < D)
    tl.store(LSE + row, tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E))


@torch.library.custom_op("ctxbench::decode", mutates_args=())
def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int, start: int, sinks: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    B, H, T, D = q.shape
    heads, capacity = k.shape[1], k.shape[2]
    group, chosen = H // heads, config(D, q.element_size())
    of_queries = triton.cdiv(group * T, chosen.rows)
    part = chunk(B * heads * of_queries, keys, chosen.columns)
    parts = triton.cdiv(keys, part)
    out, lse = _decode_fake(q, k, v, keys, start, sinks, causal, scale)
    partial, partial_lse = out[None], lse  # of one part there is nothing to merge
    if parts > 1:
        partial, partial_lse = (lse.new_empty(parts, B, H, T, *last) for last in ((D,), ()))
    shared = {"D": D, "WIDTH": padded(D)}
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
        partial_kernel[parts, B * heads, of_queries](
            q, k, v, partial, partial_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *partial.stride()[:4],
            heads, T, capacity, keys, start, sinks, part, scale, GROUP=group, ROWS=chosen.rows,
            COLUMNS=chosen.columns, CHUNK=chunk_of_channels(D, q.element_size()), CAUSAL=causal and T > 1,
            RING=start > 0, num_warps=chosen.warps, num_stages=chosen.stages, **shared,
        )  # fmt: skip
        if parts > 1:
            merge_kernel[B * H * T,](
                partial, partial_lse, out, lse, *out.stride()[:3], H, T, parts, PARTS=PARTS, num_warps=1, **shared
            )
    return out, lse


@_decode.register_fake
def _decode_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int, start: int, sinks: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)  # heads stay where they are, so merging them is free
    if out.stride(3) != 1:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int | None = None, *, start: int = 0, sinks: int = 0,
    causal: bool = True, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax attention of few queries, the last of which stands at the last key. Gives no gradients.

    Args:
        q: ``[B, H, T, D]``, any strides; float32, float16 or bfloat16.
        k: ``[B, G, S, D]``; H is a multiple of G, and G heads of keys serve H / G heads of queries each.
        v: the same shape as ``k``.
        keys: how many rows of the cache are filled; None for all.
        start: in a full ring, how many rows after the sinks its oldest key lies.
        sinks: rows at the front of the cache that stay.
        causal: an earlier query sees no key after its own.
        scale: of the scores; None for ``D ** -0.5``.

    Returns:
        Output ``[B, H, T, D]``, and the natural log-sum-exp of the scaled scores ``[B, H, T]`` in float32. A query that
        sees no key has output 0 and log-sum-exp minus infinity.

    Raises:
        ValueError: for shapes, dtypes or places the kernels do not take.
    """
    if v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must agree in batch and width, and the heads of q be a multiple of those of k and v, received "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be all fp32, fp16 or bf16, received {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[3] > WIDEST[q.element_size()]:
        raise ValueError(f"in {q.dtype} a head has at most {WIDEST[q.element_size()]} channels, received {q.shape[3]}")
    capacity = k.shape[2]
    keys = capacity if keys is None else keys
    if not 1 <= keys <= capacity:
        raise ValueError(f"keys must be between 1 and the {capacity} rows of the cache, received {keys}")
    if start and keys < capacity:
        raise ValueError(f"only a full ring has its oldest key elsewhere, received start={start} and keys={keys}")
    if not 0 <= sinks < capacity or not 0 <= start < capacity - sinks:
        raise ValueError(f"sinks and start must lie in a cache of {capacity} rows, received {sinks} and {start}")
    return _decode(q, k, v, keys, start, sinks, causal, q.shape[3] ** -0.5 if scale is None else scale)


def is_decoding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a call has few queries beside its keys, and nobody asks for gradients."""
    few = q.shape[2] <= FEW and k.shape[2] >= 2 * FEW + q.shape[2]
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


@formula(torch.ops.ctxbench.decode)
def _decode_flops(q: Any, k: Any, v: Any, keys: int, start: int, sinks: int, causal: bool, *_: Any, **__: Any) -> int:
    """Two products over the visible pairs; the products of the rows that fill a tile are not counted."""
    return int(4 * q.shape[0] * q.shape[1] * q.shape[3] * visible_pairs(q.shape[2], keys, causal))
