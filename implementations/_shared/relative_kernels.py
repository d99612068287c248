"""Fused attention with Transformer-XL's relative term, in Triton: one launch for all segments, no score matrix.

The score of query i and key j is ``[(q_i + u) . k_j + (q_i + w) . r_distance] / sqrt(D)``. Rows of one stream are seen
along a staircase: from ``memory`` rows before a query's segment (``BAND``: before the query) up to the query. Entries
of a second stream may stand in front of them, a window of it for each segment. Within a segment a distance is always
``row + shift - key``.

A square tile of SIDE rows and SIDE keys meets ``2 SIDE - 1`` distances, so two blocks of distance keys: those from
``row + shift - key`` of its corner on, ``upper``, and the SIDE before them, ``lower``. Element (a, b) of the tile lies
in column ``(a - b) mod SIDE`` of the first where ``a >= b``, else of the second (``skew``). Walking up the keys, the
lower block of one tile is the upper of the next: one product a tile instead of two. The map is its own inverse, so the
gradient goes back the same way.

The backward pass is in ``relative_backward``.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash_rows import _channels, _dot, _held, _store
from ctxbench.implementations._shared.flash_softmax import LOG2_E, _online


@triton.jit
def rows_of(base, start, stride, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``start .. start + ROWS`` of a ``[count, D]`` matrix as ``[ROWS, WIDTH]``, zero beyond any edge."""
    return _channels(base, start, stride, count, 0, ROWS, D, WIDTH, WIDTH, True)


@triton.jit
def vector_of(base, channel, D: tl.constexpr, CHUNK: tl.constexpr):
    """Of a row of D numbers CHUNK from one on, as float32 ``[1, CHUNK]``."""
    column = channel + tl.arange(0, CHUNK)
    return tl.load(base + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def raised(q, VECTOR, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Queries that are held plus a vector, for ``raised_product``."""
    queries = q
    if CHUNK < WIDTH:
        queries = q[0], q[1], q[2], q[3], VECTOR
    if CHUNK == WIDTH:
        queries = (q + vector_of(VECTOR, 0, D, WIDTH)).to(q.dtype)
    return queries


@triton.jit
def raised_product(queries, rows, SIDE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """``(q + vector) @ rows.T`` of rows that are held, see ``flash_rows``."""
    if CHUNK < WIDTH:
        product = tl.zeros([SIDE, SIDE], tl.float32)
        for channel in range(0, WIDTH, CHUNK):
            q = _channels(queries[0], queries[1], queries[2], queries[3], channel, SIDE, D, WIDTH, CHUNK)
            q = (q + vector_of(queries[4], channel, D, CHUNK)).to(q.dtype)
            k = _channels(rows[0], rows[1], rows[2], rows[3], channel, SIDE, D, WIDTH, CHUNK, True)
            product += _dot(q, tl.trans(k))
    else:
        product = _dot(queries, tl.trans(rows))
    return product


@triton.jit
def skew(upper, lower, walked, SIDE: tl.constexpr):
    """From columns by distance to columns by key, or back: ``[SIDE, SIDE]`` from the columns of two blocks.

    ``walked`` is a multiple of SIDE that changes from tile to tile and so nothing here: without it the compiler would
    keep the index of every element in a register of its own through the whole loop.
    """
    a, b = tl.arange(0, SIDE)[:, None] + walked, tl.arange(0, SIDE)[None, :]
    return tl.gather(tl.where(b <= (a & (SIDE - 1)), upper, lower), (a - b) & (SIDE - 1), 1)


@triton.jit
def rows_seen(row, T, S, past, phase, segment, memory, BAND: tl.constexpr, CAUSAL: tl.constexpr):
    """The first key of a row, and the one after its last; no key for rows that do not exist."""
    low = row + past - memory + 1
    if not BAND:
        low = (row + phase) // segment * segment - phase + past - memory
    high = S
    if CAUSAL:
        high = row + past + 1
    return tl.maximum(low, 0), tl.where(row < T, high, 0)


@triton.jit
def entries_seen(number, past, phase, segment, memory, known, capacity, rate):
    """The first entry that a segment sees, the one after its last, and the shift of its distances."""
    left = tl.maximum(number * segment - phase + past - memory, 0)  # rows that have left the memory
    last = known + left // rate
    return tl.maximum(last - capacity, 0), last, past - left + last


@triton.jit
def forward_tile(
    top, total, acc, upper, content, position, low, high, key, walked, distance, K, V, R, k_row, v_row, r_row, S,
    distances, to_base_2, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; ``upper``: of the tile's first distance block, which it moves on by one."""
    k = _held(K, key, k_row, S, SIDE, D, WIDTH, CHUNK, True)
    r = _held(R, distance - SIDE, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    lower = raised_product(position, r, SIDE, D, WIDTH, CHUNK)
    keys = key + tl.arange(0, SIDE)[None, :]
    seen = (keys >= low[:, None]) & (keys < high[:, None])
    scores = raised_product(content, k, SIDE, D, WIDTH, CHUNK) + skew(upper, lower, walked, SIDE)
    scores = tl.where(seen, scores * to_base_2, float("-inf"))
    top, total, p, shrink = _online(top, total, scores, 1.0)
    v = rows_of(V, key, v_row, S, SIDE, D, WIDTH)
    return top, total, acc * shrink[:, None] + _dot(p.to(v.dtype), v), lower


@triton.jit
def relative_forward_kernel(
    Q, U, W, K, V, R, FAR_K, FAR_V, OUT, LSE, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    far_k_batch, far_k_head, far_k_row, far_v_batch, far_v_head, far_v_row, o_batch, o_head, o_row, r_head, r_row,
    heads, T, S, distances, nearest, past, phase, segment, memory, entries, known, capacity, rate, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr, BAND: tl.constexpr,
    CAUSAL: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of rows. Grid: tiles of rows, batch x heads."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * SIDE  # the rows with most keys begin first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    OUT += batch * o_batch + head * o_head
    R += head * r_head

    q = _held(Q, start, q_row, T, SIDE, D, WIDTH, CHUNK, True)
    content, position = raised(q, U + head * D, D, WIDTH, CHUNK), raised(q, W + head * D, D, WIDTH, CHUNK)
    row = start + tl.arange(0, SIDE)
    top = tl.full([SIDE], float("-inf"), tl.float32)  # running maximum and sum, in units of base 2
    total = tl.zeros([SIDE], tl.float32)
    acc = tl.zeros([SIDE, WIDTH], tl.float32)
    to_base_2 = scale * LOG2_E

    low, high = rows_seen(row, T, S, past, phase, segment, memory, BAND, CAUSAL)
    end = tl.minimum(start + SIDE, T)
    first, _ = rows_seen(start, T, S, past, phase, segment, memory, BAND, CAUSAL)
    _, last = rows_seen(end - 1, T, S, past, phase, segment, memory, BAND, CAUSAL)
    distance = start + past - first - nearest  # row of R at which the upper block of the first tile begins
    r = _held(R, distance, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
    upper = raised_product(position, r, SIDE, D, WIDTH, CHUNK)
    for key in range(first, last, SIDE):
        top, total, acc, upper = forward_tile(
            top, total, acc, upper, content, position, low, high, key, key - first, start + past - key - nearest, K, V,
            R, k_row, v_row, r_row, S, distances, to_base_2, D, WIDTH, CHUNK, SIDE,
        )  # fmt: skip
    if FAR:
        FAR_K += batch * far_k_batch + head * far_k_head
        FAR_V += batch * far_v_batch + head * far_v_head
        number = (row + phase) // segment
        for seg in range((start + phase) // segment, (end - 1 + phase) // segment + 1):
            first, last, shift = entries_seen(seg, past, phase, segment, memory, known, capacity, rate)
            r = _held(R, start + shift - first, r_row, distances, SIDE, D, WIDTH, CHUNK, True)
            upper = raised_product(position, r, SIDE, D, WIDTH, CHUNK)
            far_high = tl.where(number == seg, last, 0)
            for key in range(first, last, SIDE):
                top, total, acc, upper = forward_tile(
                    top, total, acc, upper, content, position, tl.zeros_like(row), far_high, key, key - first, start +
                    shift - key, FAR_K, FAR_V, R, far_k_row, far_v_row, r_row, entries, distances, to_base_2, D, WIDTH,
                    CHUNK, SIDE,
                )  # fmt: skip
    empty = total == 0.0  # rows that do not exist
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    _store(OUT, start, o_row, T, acc, SIDE, D, WIDTH)
    lse = (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + row, lse, mask=row < T)
