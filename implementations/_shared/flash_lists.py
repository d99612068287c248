"""Fused attention of blocks of queries over listed blocks of keys, in Triton. The operator around it is ``lists``.

A block is ``size`` tokens, the last one what is left. Row r of a head sees the blocks ``COLUMNS_OF[OFFSETS[r] ..
OFFSETS[r + 1]]``; for dK and dV the same lists are turned round. A block larger than a tile is several tiles. Softmax,
biases and gradients are those of ``flash``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash import PLAIN, TABLE, _biased
from ctxbench.implementations._shared.flash_bias import _add_diagonals, _diagonals
from ctxbench.implementations._shared.flash_rows import _dot, _held, _load, _product, _store, _whole
from ctxbench.implementations._shared.flash_softmax import LOG2_E, _add_dkv, _add_dq, _log_sum, _lse, _mean, _online


@triton.jit
def _piece(entry, LISTED, size, count, pieces, BLOCK: tl.constexpr):
    """Where the tile of one step over a list of blocks begins, and where its block ends."""
    block = tl.load(LISTED + entry // pieces)
    start = block * size + entry % pieces * BLOCK
    return start, tl.minimum(block * size + size, count)


@triton.jit
def listed_forward_kernel(
    Q, K, V, OUT, LSE, BIASES, OFFSETS, LISTED, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, heads, T, S, size, ahead, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of a block of queries. Grid: tiles of all blocks, batch x heads."""
    pieces, of_keys = tl.cdiv(size, ROWS), tl.cdiv(size, COLUMNS)
    block = tl.program_id(0) // pieces
    start, end = block * size + tl.program_id(0) % pieces * ROWS, tl.minimum(block * size + size, T)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    row = start + tl.arange(0, ROWS)
    q = _held(Q + batch * q_batch + head * q_head, start, q_row, end, ROWS, D, WIDTH, CHUNK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    factor = scale * LOG2_E
    if BIAS != PLAIN:
        factor = 1.0
    biases = BIASES + head * (2 * farthest + 1)
    at = OFFSETS + head * (tl.cdiv(T, size) + 1) + block
    for entry in range(tl.load(at) * of_keys, tl.load(at + 1) * of_keys):
        first, last = _piece(entry, LISTED, size, S, of_keys, COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        k = _held(K, first, k_row, last, COLUMNS, D, WIDTH, CHUNK)
        scores = _biased(
            _product(q, k, ROWS, COLUMNS, D, WIDTH, CHUNK), biases, farthest, row[:, None], column[None, :], start,
            first, 1, ahead, scale * LOG2_E, True, BIAS,
        )  # fmt: skip
        scores = tl.where((column < last)[None, :], scores, float("-inf"))
        top, total, p, shrink = _online(top, total, scores, factor)
        v = _load(V, first, v_row, last, COLUMNS, D, WIDTH)
        acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
    out = _mean(total, acc)
    _store(OUT + batch * o_batch + head * o_head, start, o_row, end, out, ROWS, D, WIDTH)
    lse = _log_sum(top, total)
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + row, lse, mask=row < end)


@triton.jit
def listed_dq_kernel(
    Q, K, V, OUT, GRAD, LSE, DELTA, BIASES, DQ, OFFSETS, LISTED, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row, g_batch, g_head, g_row, dq_batch, dq_head, dq_row,
    heads, T, S, size, ahead, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient dQ of one tile, and the row sums of ``grad * output``. Grid as forward."""
    pieces, of_keys = tl.cdiv(size, ROWS), tl.cdiv(size, COLUMNS)
    block = tl.program_id(0) // pieces
    start, end = block * size + tl.program_id(0) % pieces * ROWS, tl.minimum(block * size + size, T)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    of_rows = tl.program_id(1).to(tl.int64) * T
    row = start + tl.arange(0, ROWS)
    q = _held(Q + batch * q_batch + head * q_head, start, q_row, end, ROWS, D, WIDTH, CHUNK)
    grad = _held(GRAD + batch * g_batch + head * g_head, start, g_row, end, ROWS, D, WIDTH, CHUNK)
    o = _load(OUT + batch * o_batch + head * o_head, start, o_row, end, ROWS, D, WIDTH)
    delta = tl.sum(_whole(grad, ROWS, D, WIDTH, CHUNK).to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + of_rows + row, delta, mask=row < end)
    lse = _lse(LSE + of_rows, row, end)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    factor = scale * LOG2_E
    if BIAS != PLAIN:
        factor = 1.0
    biases = BIASES + head * (2 * farthest + 1)
    at = OFFSETS + head * (tl.cdiv(T, size) + 1) + block
    for entry in range(tl.load(at) * of_keys, tl.load(at + 1) * of_keys):
        first, last = _piece(entry, LISTED, size, S, of_keys, COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        k = _held(K, first, k_row, last, COLUMNS, D, WIDTH, CHUNK)
        v = _held(V, first, v_row, last, COLUMNS, D, WIDTH, CHUNK)
        scores = _biased(
            _product(q, k, ROWS, COLUMNS, D, WIDTH, CHUNK), biases, farthest, row[:, None], column[None, :], start,
            first, 1, ahead, scale * LOG2_E, True, BIAS,
        )  # fmt: skip
        scores = tl.where((column < last)[None, :], scores, float("-inf"))
        acc = _add_dq(acc, scores, factor, lse, delta, grad, k, v, ROWS, COLUMNS, D, WIDTH, CHUNK)
    _store(DQ + batch * dq_batch + head * dq_head, start, dq_row, end, acc * scale, ROWS, D, WIDTH)


@triton.jit
def listed_dkv_kernel(
    Q, K, V, GRAD, LSE, DELTA, BIASES, DK, DV, OFFSETS, LISTED, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, g_batch, g_head, g_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    heads, T, S, size, ahead, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of a block of keys, from the rows that list it. Grid: tiles of keys, batch x heads."""
    pieces, of_rows = tl.cdiv(size, COLUMNS), tl.cdiv(size, ROWS)
    block = tl.program_id(0) // pieces
    start, end = block * size + tl.program_id(0) % pieces * COLUMNS, tl.minimum(block * size + size, S)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    GRAD += batch * g_batch + head * g_head
    LSE += tl.program_id(1).to(tl.int64) * T
    DELTA += tl.program_id(1).to(tl.int64) * T
    column = start + tl.arange(0, COLUMNS)
    k = _held(K + batch * k_batch + head * k_head, start, k_row, end, COLUMNS, D, WIDTH, CHUNK)
    v = _held(V + batch * v_batch + head * v_head, start, v_row, end, COLUMNS, D, WIDTH, CHUNK)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH], tl.float32)
    factor = scale * LOG2_E
    if BIAS != PLAIN:
        factor = 1.0
    biases = BIASES + head * (2 * farthest + 1)
    at = OFFSETS + head * (tl.cdiv(S, size) + 1) + block
    for entry in range(tl.load(at) * of_rows, tl.load(at + 1) * of_rows):
        first, last = _piece(entry, LISTED, size, T, of_rows, ROWS)
        row = first + tl.arange(0, ROWS)
        q = _held(Q, first, q_row, last, ROWS, D, WIDTH, CHUNK)
        grad = _held(GRAD, first, g_row, last, ROWS, D, WIDTH, CHUNK)
        lse = _lse(LSE, row, last)
        delta = tl.load(DELTA + row, mask=row < last, other=0.0)
        scores = _biased(
            _product(k, q, COLUMNS, ROWS, D, WIDTH, CHUNK), biases, farthest, row[None, :], column[:, None], first,
            start, 1, ahead, scale * LOG2_E, True, BIAS,
        )  # fmt: skip
        scores = tl.where((row < last)[None, :], scores, float("-inf"))
        dk, dv = _add_dkv(dk, dv, scores, factor, lse, delta, q, grad, v, ROWS, COLUMNS, D, WIDTH, CHUNK)
    _store(DK + batch * dk_batch + head * dk_head, start, dk_row, end, dk * scale, COLUMNS, D, WIDTH)
    _store(DV + batch * dv_batch + head * dv_head, start, dv_row, end, dv, COLUMNS, D, WIDTH)


@triton.jit
def listed_table_kernel(
    Q, K, V, GRAD, LSE, DELTA, BIASES, SUMS, OFFSETS, LISTED, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, g_batch, g_head, g_row, heads, T, S, size, ahead, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of a table to SUMS ``[tiles, batch x heads, 2 farthest + 1]``, zeros before. Grid as forward.

    See ``flash_bias``. Tiles that are wholly too far add to the ends alone.
    """
    pieces, of_keys = tl.cdiv(size, ROWS), tl.cdiv(size, COLUMNS)
    block = tl.program_id(0) // pieces
    start, end = block * size + tl.program_id(0) % pieces * ROWS, tl.minimum(block * size + size, T)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    of_rows = tl.program_id(1).to(tl.int64) * T
    row = start + tl.arange(0, ROWS)
    q = _held(Q + batch * q_batch + head * q_head, start, q_row, end, ROWS, D, WIDTH, CHUNK)
    grad = _held(GRAD + batch * g_batch + head * g_head, start, g_row, end, ROWS, D, WIDTH, CHUNK)
    delta = tl.load(DELTA + of_rows + row, mask=row < end, other=0.0)
    lse = _lse(LSE + of_rows, row, end)
    left, right = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    diagonal, source, there = _diagonals(ROWS, COLUMNS)
    width = 2 * farthest + 1
    biases = BIASES + head * width
    SUMS += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * width
    at = OFFSETS + head * (tl.cdiv(T, size) + 1) + block
    for entry in range(tl.load(at) * of_keys, tl.load(at + 1) * of_keys):
        first, last = _piece(entry, LISTED, size, S, of_keys, COLUMNS)
        column = first + tl.arange(0, COLUMNS)
        k = _held(K, first, k_row, last, COLUMNS, D, WIDTH, CHUNK)
        v = _held(V, first, v_row, last, COLUMNS, D, WIDTH, CHUNK)
        scores = _biased(
            _product(q, k, ROWS, COLUMNS, D, WIDTH, CHUNK), biases, farthest, row[:, None], column[None, :], start,
            first, 1, ahead, scale * LOG2_E, True, TABLE,
        )  # fmt: skip
        scores = tl.where((column < last)[None, :], scores, float("-inf"))
        ds = tl.exp2(scores - lse[:, None]) * (_product(grad, v, ROWS, COLUMNS, D, WIDTH, CHUNK) - delta[:, None])
        distance, place = column[None, :] + ahead - row[:, None], first + ahead - start
        left += tl.sum(tl.where(distance <= -farthest, ds, 0.0), 1)
        right += tl.sum(tl.where(distance >= farthest, ds, 0.0), 1)
        if (place + COLUMNS > -farthest) & (place - ROWS < farthest):
            _add_diagonals(SUMS, ds, diagonal, source, there, place, farthest)
    tl.store(SUMS, tl.sum(left, 0))
    tl.store(SUMS + 2 * farthest, tl.sum(right, 0))
