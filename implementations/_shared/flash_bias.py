"""The gradient of a table of biases by distance, in Triton: sums of the scores' gradient along diagonals.

Every tile of queries computes its probabilities once more and writes one row of sums, which the operator then adds up:
two products beside the seven of the backward pass, and the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash import TABLE, _biased, _count, _risen, _seen, _tile
from ctxbench.implementations._shared.flash import _tiles_of_rows as tiles_of_rows
from ctxbench.implementations._shared.flash_rows import _held, _product
from ctxbench.implementations._shared.flash_softmax import LOG2_E, _lse


@triton.jit
def _diagonals(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of every diagonal of a tile, keys minus rows from its first pair, and for each of its rows the column there."""
    diagonal = tl.arange(0, ROWS + COLUMNS) - (ROWS - 1)
    column = diagonal[None, :] + tl.arange(0, ROWS)[:, None]
    return diagonal, tl.minimum(tl.maximum(column, 0), COLUMNS - 1), (column >= 0) & (column < COLUMNS)


@triton.jit
def _add_diagonals(SUMS, ds, diagonal, column, there, place, farthest):
    """Add a tile whose first pair is ``place`` apart: the sums of its diagonals that are nearer than the farthest."""
    sums = tl.sum(tl.where(there, tl.gather(ds, column, 1), 0.0), 0)
    distance = diagonal + place
    nearer = (distance > -farthest) & (distance < farthest)
    at = SUMS + farthest + distance
    tl.debug_barrier()  # the tile before wrote there from other threads
    tl.store(at, tl.load(at, mask=nearer, other=0.0) + sums, mask=nearer)


@triton.jit
def _table_range(
    left, right, q, grad, lse, delta, SUMS, keys, biases, farthest, batch, head, start, T, to_base_2,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """What is too far on either side, by rows; every nearer diagonal is added where SUMS points."""
    K, V, k_batch, k_head, k_row, v_batch, v_head, v_row, group, S, low, high, every, ahead, SINCE = keys
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    row = start + tl.arange(0, ROWS)
    diagonal, source, there = _diagonals(ROWS, COLUMNS)
    first, inner, near, past, outer, last = tiles_of_rows(
        start, T, S, low, high, ahead, farthest, ROWS, COLUMNS, LOW, HIGH, TABLE
    )
    for part in tl.static_range(2):
        for step in range(0, _count(first, inner, near, past, outer, last, part == 1)):
            tile = _tile(step, first, inner, near, past, outer, part == 1, TABLE)
            k = _held(K, tile * COLUMNS, k_row, S, COLUMNS, D, WIDTH, CHUNK)
            v = _held(V, tile * COLUMNS, v_row, S, COLUMNS, D, WIDTH, CHUNK)
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            scores = _biased(
                _product(q, k, ROWS, COLUMNS, D, WIDTH, CHUNK), biases, farthest, row[:, None], column[None, :], start,
                tile * COLUMNS, every, ahead, to_base_2, part == 1, TABLE,
            )  # fmt: skip
            scores = _risen(scores, row[:, None], column[None, :], S, SINCE, KNOWN)
            if part == 1:
                scores = _seen(scores, row, column, S, low, high, LOW, HIGH)
            ds = tl.exp2(scores - lse[:, None]) * (_product(grad, v, ROWS, COLUMNS, D, WIDTH, CHUNK) - delta[:, None])
            if part == 0:  # all on one side
                side = tile * COLUMNS + ahead < start
                left += tl.where(side, tl.sum(ds, 1), 0.0)
                right += tl.where(side, 0.0, tl.sum(ds, 1))
            else:
                distance = column[None, :] + ahead - row[:, None]
                left += tl.sum(tl.where(distance <= -farthest, ds, 0.0), 1)
                right += tl.sum(tl.where(distance >= farthest, ds, 0.0), 1)
                place = tile * COLUMNS + ahead - start
                _add_diagonals(SUMS, ds, diagonal, source, there, place, farthest)
    return left, right


@triton.jit
def table_kernel(
    Q, GRAD, LSE, DELTA, BIASES, SUMS, ranges, q_batch, q_head, q_row, g_batch, g_head, g_row, heads, T,
    farthest, scale, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, KINDS: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Adds to SUMS ``[tiles of queries, batch x heads, 2 farthest + 1]``, zeros before. Grid as forward."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    of_rows = tl.program_id(1).to(tl.int64) * T
    row = start + tl.arange(0, ROWS)
    q = _held(Q + batch * q_batch + head * q_head, start, q_row, T, ROWS, D, WIDTH, CHUNK)
    grad = _held(GRAD + batch * g_batch + head * g_head, start, g_row, T, ROWS, D, WIDTH, CHUNK)
    delta = tl.load(DELTA + of_rows + row, mask=row < T, other=0.0)
    lse = _lse(LSE + of_rows, row, T)
    left, right = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    width = 2 * farthest + 1
    SUMS += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * width
    for which in tl.static_range(RANGES):
        if KINDS[which][2] == TABLE:
            left, right = _table_range(
                left, right, q, grad, lse, delta, SUMS, ranges[which], BIASES + head * width, farthest, batch, head,
                start, T, scale * LOG2_E, D, WIDTH, CHUNK, ROWS, COLUMNS, KINDS[which][0], KINDS[which][1],
                KINDS[which][3],
            )  # fmt: skip
    tl.store(SUMS, tl.sum(left, 0))
    tl.store(SUMS + 2 * farthest, tl.sum(right, 0))
