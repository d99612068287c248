"""Rotations (RoPE) in Triton: rows turned in one pass, and attention that turns its queries as it reads them.

Channel n of a row turns with channel n + D / 2 by the angle whose cosine and sine stand in row i, column n of COS and
SIN, ``[T, D / 2]`` in float32 with channels side by side and ``t_row`` numbers from one row to the next. Products are
taken in float32 and rounded once, to the dtype of the rows.

A tile of queries is read once, so it is turned in passing. A tile of keys is read again by every tile of queries that
sees it and comes by asynchronous copies, which compute nothing: keys are turned before they are attended to.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash import _attend_range
from ctxbench.implementations._shared.flash_rows import _held, _store
from ctxbench.implementations._shared.flash_softmax import LOG2_E, _log_sum, _mean

PRODUCTS = tl.constexpr(16384)  # of a channel and an angle that are in registers at once, two to a channel


@triton.jit
def _angles(COS, SIN, start, t_row, T, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Cosines and sines of ROWS rows, ``[ROWS, HALF]``, zero beyond either edge; HALF is D / 2 up to a power of two."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (row < T - start) & (channel < D // 2)
    places = (start + row) * t_row + channel
    return tl.load(COS + places, mask=mask, other=0.0), tl.load(SIN + places, mask=mask, other=0.0)


@triton.jit
def _turn(
    source, target, cos, sin, start, source_row, target_row, T, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """Turn ROWS rows from ``start`` on of one ``[T, D]`` matrix into those of another, or of the same."""
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (row < T - start) & (channel < D // 2)
    source += (start + row) * source_row + channel
    target += (start + row) * target_row + channel
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + D // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (a * cos - b * sin).to(target.dtype.element_ty), mask=mask)
    tl.store(target + D // 2, (b * cos + a * sin).to(target.dtype.element_ty), mask=mask)


@triton.jit
def turn_kernel(
    X, OUT, COS, SIN, x_batch, x_head, x_row, o_batch, o_head, o_row, t_row, heads, count, T,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rows of HEADS heads turned, or BACK: turned back, into OUT, which may be X. Grid: tiles of rows x heads.

    ``heads`` are those of one sequence, ``count`` those of all.
    """
    groups = tl.cdiv(count, HEADS)  # those that run together have one tile's angles in common
    start, first = (tl.program_id(0) // groups).to(tl.int64) * ROWS, tl.program_id(0) % groups * HEADS
    cos, sin = _angles(COS, SIN, start, t_row, T, D, HALF, ROWS)
    if BACK:
        sin = -sin
    for which in range(first, tl.minimum(first + HEADS, count)):
        batch, head = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
        source, target = X + batch * x_batch + head * x_head, OUT + batch * o_batch + head * o_head
        _turn(source, target, cos, sin, start, x_row, o_row, T, D, HALF, ROWS)


@triton.jit
def turned_kernel(
    Q, COS, SIN, TURNED, OUT, LSE, BIASES, ranges, q_batch, q_head, q_row, o_batch, o_head, o_row, t_row, heads, T,
    farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KINDS: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """``flash.forward_kernel`` of queries that are turned first, into TURNED, which lies as OUT does and may be OUT.

    From there a product takes them as it takes all that is loaded. Of registers it would hold them, one block less of
    threads beside it; and rows of the output are this block's own, until it writes them.
    """
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # causal: the rows with most keys begin first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first, place = tl.cast(start, tl.int64), batch * o_batch + head * o_head
    PIECE: tl.constexpr = ROWS if ROWS * WIDTH <= PRODUCTS else PRODUCTS // WIDTH  # more would spill
    for piece in range(0, ROWS, PIECE):
        cos, sin = _angles(COS, SIN, first + piece, t_row, T, D, WIDTH // 2, PIECE)
        source, target = Q + batch * q_batch + head * q_head, TURNED + place
        _turn(source, target, cos, sin, first + piece, q_row, o_row, T, D, WIDTH // 2, PIECE)
    tl.debug_barrier()  # what one thread wrote others read
    q = _held(TURNED + place, start, o_row, T, ROWS, D, WIDTH, CHUNK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    biases = BIASES + head * (2 * farthest + 1)
    for which in tl.static_range(RANGES):
        top, total, acc = _attend_range(
            q, top, total, acc, ranges[which], biases, farthest, batch, head, start, T, scale * LOG2_E,
            D, WIDTH, CHUNK, ROWS, COLUMNS, KINDS[which][0], KINDS[which][1], KINDS[which][2], KINDS[which][3],
        )  # fmt: skip
    out = _mean(total, acc)
    tl.debug_barrier()  # and by now nobody reads it
    _store(OUT + place, start, o_row, T, out, ROWS, D, WIDTH)
    row = start + tl.arange(0, ROWS)
    lse = _log_sum(top, total)
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + row, lse, mask=row < T)
