"""The two kernels of ``decode`` in Triton: a part of the keys of a few queries, and the merge of all parts."""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash_softmax import LOG2_E, _log_sum, _mean, _online

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
        top, total, p, shrink = _online(top, total, scores, to_base_2)
        v = _channels(V, place * v_row, key < last, 0, D, WIDTH)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")
    out = _mean(total, acc)
    written = tl.program_id(0).to(tl.int64) * o_part + batch.to(tl.int64) * o_batch + head.to(tl.int64) * o_head
    written += token * o_row
    inside = there[:, None] & (column < D)[None, :]
    tl.store(OUT + written[:, None] + column[None, :], out.to(OUT.dtype.element_ty), mask=inside)
    lse = _log_sum(top, total)
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
