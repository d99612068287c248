"""The backward pass of ``relative_kernels``: three kernels that compute the probabilities again, by three tilings.

dQ by rows of queries; dK, dV and du by keys; dR and dw by distances, where it is the keys of a tile that lie in two
blocks. Nothing is added atomically, every run gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash_rows import _dot, _held, _product, _store, _weighted, _whole
from ctxbench.implementations._shared.flash_softmax import LOG2_E
from ctxbench.implementations._shared.relative_kernels import (
    entries_seen,
    raised,
    raised_product,
    rows_of,
    rows_seen,
    skew,
)


@triton.jit
def probabilities(content, by_distance, to_base_2, lse, seen):
    """From the log-sum-exp, in base 2, of every row."""
    scores = tl.where(seen, (content + by_distance) * to_base_2, float("-inf"))
    return tl.exp2(scores - lse[:, None])


@triton.jit
def dq_tile(
    dq, upper, carried, content, position, grad, lse, delta, low, high, key, walked, distance, K, V, R, k_row, v_row,
    r_row, S, distances, to_base_2, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys; ``carried``: gradients by distance that the next tile completes."""
    k = _held(K, key, k_row, S, SIDE, D, WIDTH, CHUNK, True)
    r = _held(R, distance - SIDE, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    lower = raised_product(position, r, SIDE, D, WIDTH, CHUNK)
    keys = key + tl.arange(0, SIDE)[None, :]
    seen = (keys >= low[:, None]) & (keys < high[:, None])
    scores = raised_product(content, k, SIDE, D, WIDTH, CHUNK)
    p = probabilities(scores, skew(upper, lower, walked, SIDE), to_base_2, lse, seen)
    v = _held(V, key, v_row, S, SIDE, D, WIDTH, CHUNK, True)
    ds = p * (_product(grad, v, SIDE, SIDE, D, WIDTH, CHUNK, True) - delta[:, None])
    dq += _weighted(ds, k, SIDE, D, WIDTH, CHUNK, True)
    by_distance = skew(ds, ds, walked, SIDE)
    first = tl.arange(0, SIDE)[None, :] <= tl.arange(0, SIDE)[:, None]
    done = tl.where(first, by_distance, 0.0).to(carried.dtype) + carried
    dq += _dot(done, rows_of(R, distance, r_row, distances, SIDE, D, WIDTH))
    return dq, lower, tl.where(first, 0.0, by_distance).to(carried.dtype)


@triton.jit
def relative_dq_kernel(
    Q, U, W, K, V, R, FAR_K, FAR_V, OUT, GRAD, LSE, DELTA, DQ, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch,
    v_head, v_row, far_k_batch, far_k_head, far_k_row, far_v_batch, far_v_head, far_v_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, dq_batch, dq_head, dq_row, r_head, r_row,
    heads, T, S, distances, nearest, past, phase, segment, memory, entries, known, capacity, rate, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr, BAND: tl.constexpr,
    CAUSAL: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Gradient dQ of one tile of rows, and for the other kernels the row sums of ``grad * output``. Grid as forward."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * SIDE
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    OUT += batch * o_batch + head * o_head
    GRAD += batch * g_batch + head * g_head
    DQ += batch * dq_batch + head * dq_head
    R += head * r_head
    of_rows = tl.program_id(1).to(tl.int64) * T

    q = _held(Q, start, q_row, T, SIDE, D, WIDTH, CHUNK, True)
    content, position = raised(q, U + head * D, D, WIDTH, CHUNK), raised(q, W + head * D, D, WIDTH, CHUNK)
    grad = _held(GRAD, start, g_row, T, SIDE, D, WIDTH, CHUNK, True)
    whole = _whole(grad, SIDE, D, WIDTH, CHUNK)
    delta = tl.sum(whole.to(tl.float32) * rows_of(OUT, start, o_row, T, SIDE, D, WIDTH).to(tl.float32), 1)
    row = start + tl.arange(0, SIDE)
    tl.store(DELTA + of_rows + row, delta, mask=row < T)
    lse = tl.load(LSE + of_rows + row, mask=row < T, other=0.0) * LOG2_E
    dq = tl.zeros([SIDE, WIDTH], tl.float32)
    to_base_2 = scale * LOG2_E

    low, high = rows_seen(row, T, S, past, phase, segment, memory, BAND, CAUSAL)
    end = tl.minimum(start + SIDE, T)
    first, _ = rows_seen(start, T, S, past, phase, segment, memory, BAND, CAUSAL)
    _, last = rows_seen(end - 1, T, S, past, phase, segment, memory, BAND, CAUSAL)
    distance = start + past - first - nearest
    r = _held(R, distance, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    upper = raised_product(position, r, SIDE, D, WIDTH, CHUNK)
    carried = tl.zeros([SIDE, SIDE], Q.dtype.element_ty)
    for key in range(first, last, SIDE):
        distance = start + past - key - nearest
        dq, upper, carried = dq_tile(
            dq, upper, carried, content, position, grad, lse, delta, low, high, key, key - first, distance, K, V, R,
            k_row, v_row, r_row, S, distances, to_base_2, D, WIDTH, CHUNK, SIDE,
        )  # fmt: skip
    dq += _dot(carried, rows_of(R, distance - SIDE, r_row, distances, SIDE, D, WIDTH))
    if FAR:
        FAR_K += batch * far_k_batch + head * far_k_head
        FAR_V += batch * far_v_batch + head * far_v_head
        number = (row + phase) // segment
        for seg in range((start + phase) // segment, (end - 1 + phase) // segment + 1):
            first, last, shift = entries_seen(seg, past, phase, segment, memory, known, capacity, rate)
            distance = start + shift - first
            r = _held(R, distance, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
            upper = raised_product(position, r, SIDE, D, WIDTH, CHUNK)
            carried = tl.zeros([SIDE, SIDE], Q.dtype.element_ty)
            far_high = tl.where((number == seg) & (row < T), last, 0)
            for key in range(first, last, SIDE):
                distance = start + shift - key
                dq, upper, carried = dq_tile(
                    dq, upper, carried, content, position, grad, lse, delta, tl.zeros_like(row), far_high, key, key -
                    first, distance, FAR_K, FAR_V, R, far_k_row, far_v_row, r_row, entries, distances, to_base_2, D,
                    WIDTH, CHUNK, SIDE,
                )  # fmt: skip
            dq += _dot(carried, rows_of(R, distance - SIDE, r_row, distances, SIDE, D, WIDTH))
    _store(DQ, start, dq_row, T, dq * scale, SIDE, D, WIDTH)


@triton.jit
def dkv_tile(
    dk, dv, sums, k, v, low, high, key, start, walked, shift, CONTENT, POSITION, GRAD, LSE, DELTA, R, q_row, g_row,
    r_row, T, distances, to_base_2, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows to the gradients of a tile of keys, and to the column sums of the scores' gradient."""
    row = start + tl.arange(0, SIDE)
    content = _held(CONTENT, start, q_row, T, SIDE, D, WIDTH, CHUNK, True)
    position = _held(POSITION, start, q_row, T, SIDE, D, WIDTH, CHUNK, True)
    grad = _held(GRAD, start, g_row, T, SIDE, D, WIDTH, CHUNK, True)
    lse = tl.load(LSE + row, mask=row < T, other=0.0) * LOG2_E
    delta = tl.load(DELTA + row, mask=row < T, other=0.0)
    distance = start + shift - key
    r = _held(R, distance, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    upper = _product(position, r, SIDE, SIDE, D, WIDTH, CHUNK, True)
    r = _held(R, distance - SIDE, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    lower = _product(position, r, SIDE, SIDE, D, WIDTH, CHUNK, True)
    keys = key + tl.arange(0, SIDE)[None, :]
    seen = (keys >= low[:, None]) & (keys < high[:, None])
    scores = _product(content, k, SIDE, SIDE, D, WIDTH, CHUNK)
    p = probabilities(scores, skew(upper, lower, walked, SIDE), to_base_2, lse, seen)
    dv += _weighted(tl.trans(p.to(GRAD.dtype.element_ty)), grad, SIDE, D, WIDTH, CHUNK)
    ds = p * (_product(grad, v, SIDE, SIDE, D, WIDTH, CHUNK) - delta[:, None])
    dk += _weighted(tl.trans(ds.to(CONTENT.dtype.element_ty)), content, SIDE, D, WIDTH, CHUNK)
    return dk, dv, sums + tl.sum(ds, 0)


@triton.jit
def relative_dkv_kernel(
    CONTENT, POSITION, K, V, R, GRAD, LSE, DELTA, DK, DV, OWN_DK, OWN_DV, DU, q_batch, q_head, q_row, k_batch, k_head,
    k_row, v_batch, v_head, v_row, g_batch, g_head, g_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    own_k_batch, own_k_head, own_k_row, own_v_batch, own_v_head, own_v_row, r_head, r_row, heads, T, S, distances,
    nearest, past, phase, segment, memory, known, capacity, rate, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr, BAND: tl.constexpr,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys, and its part of du. Grid: tiles of keys, batch x heads.

    ``SPLIT``: those from rows of a key's own segment are written apart, before the others are added. ``FAR``: keys are
    entries of the second stream.
    """
    start = tl.program_id(0) * SIDE
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    CONTENT += batch * q_batch + head * q_head
    POSITION += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    GRAD += batch * g_batch + head * g_head
    DK += batch * dk_batch + head * dk_head
    DV += batch * dv_batch + head * dv_head
    R += head * r_head
    LSE += tl.program_id(1).to(tl.int64) * T
    DELTA += tl.program_id(1).to(tl.int64) * T

    k = _held(K, start, k_row, S, SIDE, D, WIDTH, CHUNK, True)
    v = _held(V, start, v_row, S, SIDE, D, WIDTH, CHUNK, True)
    dk = tl.zeros([SIDE, WIDTH], tl.float32)
    dv = tl.zeros([SIDE, WIDTH], tl.float32)
    sums = tl.zeros([SIDE], tl.float32)
    to_base_2 = scale * LOG2_E
    index = tl.arange(0, SIDE)
    if FAR:
        # Segments that see any of these entries: seen from `low` on, no longer where all of them are too old.
        gone = past - phase - memory  # rows that have left the memory by segment 0, if positive
        low = tl.maximum((start + 1 - known) * rate - gone, 0)
        high = (start + SIDE + capacity - known) * rate - 1 - gone
        begin = tl.where(start < known, 0, tl.cdiv(low, segment))
        end = tl.where(high < 0, 0, tl.maximum(high, 0) // segment + 1)
        for seg in range(begin, tl.minimum(end, (T - 1 + phase) // segment + 1)):
            seen_first, seen_last, shift = entries_seen(seg, past, phase, segment, memory, known, capacity, rate)
            until = tl.minimum((seg + 1) * segment - phase, T)
            since = tl.maximum(seg * segment - phase, 0)
            for row in range(since, until, SIDE):
                seen_high = tl.where(row + index < until, seen_last, 0)
                dk, dv, sums = dkv_tile(
                    dk, dv, sums, k, v, tl.zeros_like(index) + seen_first, seen_high, start, row, row - since, shift,
                    CONTENT, POSITION, GRAD, LSE, DELTA, R, q_row, g_row, r_row, T, distances, to_base_2, D, WIDTH,
                    CHUNK, SIDE,
                )  # fmt: skip
    else:
        newest = tl.minimum(start + SIDE, S) - 1 + phase - past  # tokens, counted from the first segment's begin
        oldest = start + phase - past
        begin = 0
        if CAUSAL:
            begin = tl.maximum(oldest - phase, 0)
        if BAND:
            end = newest - phase + memory
        else:
            end = tl.where(newest + memory < 0, 0, tl.maximum(newest + memory, 0) // segment + 1) * segment - phase
        end = tl.minimum(end, T)
        if SPLIT:  # rows of these keys' own segments first
            own_end = tl.where(newest < 0, 0, tl.maximum(newest, 0) // segment + 1) * segment - phase
            for row in range(begin, tl.minimum(own_end, end), SIDE):
                low, high = rows_seen(row + index, T, S, past, phase, segment, memory, BAND, CAUSAL)
                own = (row + index + phase) // segment * segment - phase + past  # where the rows' segments begin
                dk, dv, sums = dkv_tile(
                    dk, dv, sums, k, v, tl.maximum(low, own), high, start, row, row - begin, past - nearest, CONTENT,
                    POSITION, GRAD, LSE, DELTA, R, q_row, g_row, r_row, T, distances, to_base_2, D, WIDTH, CHUNK, SIDE,
                )  # fmt: skip
            OWN_DK += batch * own_k_batch + head * own_k_head
            OWN_DV += batch * own_v_batch + head * own_v_head
            _store(OWN_DK, start, own_k_row, S, dk * scale, SIDE, D, WIDTH)
            _store(OWN_DV, start, own_v_row, S, dv, SIDE, D, WIDTH)
            begin = tl.maximum(
                tl.where(oldest < 0, 0, tl.maximum(oldest, 0) // segment + 1) * segment - phase, begin
            )  # fmt: skip
        for row in range(begin, end, SIDE):
            low, high = rows_seen(row + index, T, S, past, phase, segment, memory, BAND, CAUSAL)
            if SPLIT:
                high = tl.minimum(high, (row + index + phase) // segment * segment - phase + past)
            dk, dv, sums = dkv_tile(
                dk, dv, sums, k, v, low, high, start, row, row - begin, past - nearest, CONTENT, POSITION, GRAD, LSE,
                DELTA, R, q_row, g_row, r_row, T, distances, to_base_2, D, WIDTH, CHUNK, SIDE,
            )  # fmt: skip
    _store(DK, start, dk_row, S, dk * scale, SIDE, D, WIDTH)
    _store(DV, start, dv_row, S, dv, SIDE, D, WIDTH)
    # u is added to every query, so its gradient is that of a query: the scores' gradient times the keys.
    du = tl.sum(sums[:, None] * _whole(k, SIDE, D, WIDTH, CHUNK).to(tl.float32), 0) * scale
    column = tl.arange(0, WIDTH)
    DU += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D
    tl.store(DU + column, du, mask=column < D)


@triton.jit
def dr_tile(
    dr, sums, r, low, high, start, walked, key, CONTENT, POSITION, K, V, GRAD, LSE, DELTA, q_row, k_row, v_row, g_row,
    T, S, to_base_2, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows; ``key``: of its first row at the first distance. Each row's keys fall with the distance."""
    row = start + tl.arange(0, SIDE)
    content = _held(CONTENT, start, q_row, T, SIDE, D, WIDTH, CHUNK, True)
    position = _held(POSITION, start, q_row, T, SIDE, D, WIDTH, CHUNK, True)
    grad = _held(GRAD, start, g_row, T, SIDE, D, WIDTH, CHUNK, True)
    lse = tl.load(LSE + row, mask=row < T, other=0.0) * LOG2_E
    delta = tl.load(DELTA + row, mask=row < T, other=0.0)
    k = _held(K, key, k_row, S, SIDE, D, WIDTH, CHUNK, True)
    near = _product(content, k, SIDE, SIDE, D, WIDTH, CHUNK, True)
    k = _held(K, key - SIDE, k_row, S, SIDE, D, WIDTH, CHUNK, True)
    before = _product(content, k, SIDE, SIDE, D, WIDTH, CHUNK, True)
    # A row's keys fall with the distance; written so that nothing [SIDE, SIDE] stays the same through the loop.
    nearest, step = key + tl.arange(0, SIDE), tl.arange(0, SIDE)[None, :]
    seen = (step <= (nearest - low)[:, None]) & (step > (nearest - high)[:, None])
    scores = _product(position, r, SIDE, SIDE, D, WIDTH, CHUNK)
    p = probabilities(scores, skew(near, before, walked, SIDE), to_base_2, lse, seen)
    v = _held(V, key, v_row, S, SIDE, D, WIDTH, CHUNK, True)
    near = _product(grad, v, SIDE, SIDE, D, WIDTH, CHUNK, True)
    v = _held(V, key - SIDE, v_row, S, SIDE, D, WIDTH, CHUNK, True)
    before = _product(grad, v, SIDE, SIDE, D, WIDTH, CHUNK, True)
    ds = p * (skew(near, before, walked, SIDE) - delta[:, None])
    by_score = tl.trans(ds.to(POSITION.dtype.element_ty))
    return dr + _weighted(by_score, position, SIDE, D, WIDTH, CHUNK), sums + tl.sum(ds, 0)


@triton.jit
def relative_dr_kernel(
    CONTENT, POSITION, K, V, R, FAR_K, FAR_V, GRAD, LSE, DELTA, DR, DW, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, far_k_batch, far_k_head, far_k_row, far_v_batch, far_v_head, far_v_row, g_batch, g_head,
    g_row, r_head, r_row, heads, T, S, distances, nearest, past, phase, segment, memory, entries, known, capacity, rate,
    splits, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr, BAND: tl.constexpr,
    CAUSAL: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of distances from every ``splits``-th segment, and its part of dw; ``DR`` in float32.

    Grid: tiles of distances x splits, batch x heads.
    """
    start = tl.program_id(0) // splits * SIDE
    distance = start + nearest  # of its first row
    split = tl.program_id(0) % splits
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    CONTENT += batch * q_batch + head * q_head
    POSITION += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    GRAD += batch * g_batch + head * g_head
    R += head * r_head
    LSE += tl.program_id(1).to(tl.int64) * T
    DELTA += tl.program_id(1).to(tl.int64) * T
    if FAR:
        FAR_K += batch * far_k_batch + head * far_k_head
        FAR_V += batch * far_v_batch + head * far_v_head

    r = _held(R, start, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    dr = tl.zeros([SIDE, WIDTH], tl.float32)
    sums = tl.zeros([SIDE], tl.float32)
    to_base_2 = scale * LOG2_E
    index = tl.arange(0, SIDE)
    segments = 1 if BAND else (T - 1 + phase) // segment + 1
    for seg in range(split, segments, splits):
        begin, end, oldest = 0, T, 0
        if not BAND:
            begin = tl.maximum(seg * segment - phase, 0)
            end = tl.minimum((seg + 1) * segment - phase, T)
            oldest = tl.maximum(seg * segment - phase + past - memory, 0)
        elif distance >= memory:
            end = 0
        first = tl.maximum(begin, distance + oldest - past)  # rows that have keys so far away, and so near
        last = tl.minimum(end, distance + SIDE - 1 - past + S)
        for row in range(first, last, SIDE):
            low, high = rows_seen(row + index, T, S, past, phase, segment, memory, BAND, CAUSAL)
            high = tl.where(row + index < end, high, 0)
            dr, sums = dr_tile(
                dr, sums, r, low, high, row, row - first, row + past - distance, CONTENT, POSITION, K, V, GRAD, LSE,
                DELTA, q_row, k_row, v_row, g_row, T, S, to_base_2, D, WIDTH, CHUNK, SIDE,
            )  # fmt: skip
        if FAR:
            oldest, newest, shift = entries_seen(seg, past, phase, segment, memory, known, capacity, rate)
            first = tl.maximum(begin, distance + oldest - shift)
            last = tl.minimum(end, distance + SIDE - 1 - shift + newest)
            for row in range(first, last, SIDE):
                high = tl.where(row + index < end, newest, 0)
                dr, sums = dr_tile(
                    dr, sums, r, tl.zeros_like(index) + oldest, high, row, row - first, row + shift - distance, CONTENT,
                    POSITION, FAR_K, FAR_V, GRAD, LSE, DELTA, q_row, far_k_row, far_v_row, g_row, T, entries, to_base_2,
                    D, WIDTH, CHUNK, SIDE,
                )  # fmt: skip
    part = split.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    _store(DR + part * distances * D, start, D, distances, dr * scale, SIDE, D, WIDTH)
    dw = tl.sum(sums[:, None] * _whole(r, SIDE, D, WIDTH, CHUNK).to(tl.float32), 0) * scale
    column = tl.arange(0, WIDTH)
    DW += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D
    tl.store(DW + column, dw, mask=column < D)
