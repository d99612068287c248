"""Fused attention over ranges of keys, in Triton: no score matrix is ever written, forward or backward.

Each of up to three key tensors shows a query the keys from one line to before another (see ``lines``), and one softmax
spans them all. A line becomes a range of key tiles, so what is out of sight costs nothing; only tiles at the edges of a
range are masked. The operator around these kernels is ``ranges.attend``.

The softmax runs online (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691) in base 2. The
backward pass computes the probabilities again from the log-sum-exp, once by rows of queries for dQ and once by rows of
keys for dK and dV: seven products instead of the five that atomic additions would need, and every run gives the same
bits. Gradients through the log-sum-exp are exact, so that results over disjoint keys can be merged.

What kernels call ``keys`` is one range: ``(K, V, k_batch, k_head, k_row, v_batch, v_head, v_row, group, S, low, high,
every, ahead, SINCE)`` with strides in elements, ``group`` query heads a key head and lines ``(base, step, stride,
shift)`` over the rows of the query tensor; LOW and HIGH are the kinds of its lines. Key j is ``j * every + ahead - i``
tokens after row i; by that distance a bias is added where BIAS says so: SLOPES, minus a number a head times its size,
or TABLE, one of ``2 farthest + 1`` numbers a head, of which the first and the last serve everything farther. Where
KNOWN is not set, key j is hidden from the rows before ``SINCE[j]``, in whatever tile.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared import lines
from ctxbench.implementations._shared.flash_rows import _dot, _held, _load, _product, _store, _whole
from ctxbench.implementations._shared.flash_softmax import LOG2_E, _add_dkv, _add_dq, _log_sum, _lse, _mean, _online

OPEN, LEVEL, SLOPE = (tl.constexpr(kind) for kind in (lines.OPEN, lines.LEVEL, lines.SLOPE))
PLAIN, SLOPES, TABLE = (tl.constexpr(kind) for kind in (lines.PLAIN, lines.SLOPES, lines.TABLE))


@triton.jit
def _key_at(line, row, S, KIND: tl.constexpr):
    """Where the line of one bound, never OPEN, stands for a row: a key from 0 to S."""
    if KIND == LEVEL:
        key = row * 0 + line[0]
    elif KIND == SLOPE:
        key = row + line[0]
    else:
        key = (row + line[3]) // line[1] * line[2] + line[0]
    return tl.minimum(tl.maximum(key, 0), S)


@triton.jit
def _row_past(line, key, T, KIND: tl.constexpr):
    """The first row whose line is past a key: from 0 to T."""
    ahead = tl.maximum(key + 1 - line[0], 0)
    if KIND == LEVEL:
        row = tl.where(ahead == 0, 0, T)
    elif KIND == SLOPE:
        row = ahead
    else:
        row = tl.cdiv(ahead, line[2]) * line[1] - line[3]
    return tl.minimum(tl.maximum(row, 0), T)


@triton.jit
def _tiles(first, end, all_first, all_end, near_first, near_end, BLOCK: tl.constexpr):
    """Tiles of the other side that meet ``first .. end``, and those that lie wholly in ``all_first .. all_end``.

    Returns ``first <= inner <= near <= past <= outer <= last``, or ``last < first`` for none. The tiles ``first ..
    last`` are visited; ``inner .. near`` and ``past .. outer`` need no mask and have one bias for all their pairs,
    because they do not meet ``near_first .. near_end``.
    """
    first, last = first // BLOCK, tl.cdiv(end, BLOCK)
    inner = tl.minimum(tl.maximum(tl.cdiv(all_first, BLOCK), first), last)
    outer = tl.minimum(tl.maximum(all_end // BLOCK, inner), last)
    near = tl.minimum(tl.maximum(near_first // BLOCK, inner), outer)
    past = tl.minimum(tl.maximum(tl.cdiv(near_end, BLOCK), near), outer)
    return first, inner, near, past, outer, last


@triton.jit
def _tiles_of_rows(
    start, T, S, low, high, ahead, farthest, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Tiles of keys that a tile of rows meets."""
    final = tl.minimum(start + ROWS, T) - 1
    first, all_first, end, all_end = 0, 0, S, S
    if LOW != OPEN:
        first, all_first = _key_at(low, start, S, LOW), _key_at(low, final, S, LOW)
    if HIGH != OPEN:
        end, all_end = _key_at(high, final, S, HIGH), _key_at(high, start, S, HIGH)
    near_first, near_end = S, S
    if BIAS == TABLE:
        near_first, near_end = tl.maximum(start - ahead - farthest + 1, 0), tl.maximum(final - ahead + farthest, 0)
    return _tiles(first, end, all_first, all_end, near_first, near_end, COLUMNS)


@triton.jit
def _tiles_of_keys(
    start, T, S, low, high, ahead, farthest, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Tiles of rows that see a tile of keys."""
    final = tl.minimum(start + COLUMNS, S) - 1
    first, all_first, end, all_end = 0, 0, T, T
    if HIGH != OPEN:
        first, all_first = _row_past(high, start, T, HIGH), _row_past(high, final, T, HIGH)
    if LOW != OPEN:
        end, all_end = _row_past(low, final, T, LOW), _row_past(low, start, T, LOW)
    near_first, near_end = T, T
    if BIAS == TABLE:
        near_first, near_end = tl.maximum(start + ahead - farthest + 1, 0), tl.maximum(final + ahead + farthest, 0)
    return _tiles(first, end, all_first, all_end, near_first, near_end, ROWS)


@triton.jit
def _count(first, inner, near, past, outer, last, EDGE: tl.constexpr):
    """How many tiles are within the range, or at its edges and near."""
    count = (near - inner) + (outer - past)
    if EDGE:
        count = (inner - first) + (past - near) + (last - outer)
    return count


@triton.jit
def _tile(step, first, inner, near, past, outer, EDGE: tl.constexpr, BIAS: tl.constexpr):
    """The tile of one step of ``_count``, from left to right."""
    tile = inner + step
    if EDGE:
        tile = first + step + tl.where(step < inner - first, 0, near - inner)
        tile += tl.where(step < (inner - first) + (past - near), 0, outer - past)
    elif BIAS == TABLE:
        tile += tl.where(step < near - inner, 0, past - near)
    return tile


@triton.jit
def _biased(
    scores, biases, farthest, row, column, first_row, first_column, every, ahead, to_base_2, EDGE: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Scaled scores in base 2 with the bias of one head, or, without a bias, the scores as they are."""
    if BIAS == SLOPES:
        distance = tl.abs(column * every + ahead - row).to(tl.float32)
        scores = scores * to_base_2 - distance * (tl.load(biases) * LOG2_E)
    elif BIAS == TABLE:
        if EDGE:
            distance = tl.minimum(tl.maximum(column + ahead - row, -farthest), farthest)
        else:
            distance = tl.minimum(tl.maximum(first_column + ahead - first_row, -farthest), farthest)
        scores = scores * to_base_2 + tl.load(biases + farthest + distance) * LOG2_E
    return scores


@triton.jit
def _seen(scores, row, column, S, low, high, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Scores ``[rows, keys]`` with minus infinity where a row does not see a key."""
    end = S
    if HIGH != OPEN:
        end = _key_at(high, row, S, HIGH)[:, None]
    seen = column[None, :] < end
    if LOW != OPEN:
        seen = seen & (column[None, :] >= _key_at(low, row, S, LOW)[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _seen_by(scores, row, column, T, low, high, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Scores ``[keys, rows]`` with minus infinity where a row does not see a key."""
    end = T
    if LOW != OPEN:
        end = _row_past(low, column, T, LOW)[:, None]
    seen = row[None, :] < end
    if HIGH != OPEN:
        seen = seen & (row[None, :] >= _row_past(high, column, T, HIGH)[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _risen(scores, row, column, S, SINCE, KNOWN: tl.constexpr):
    """Scores with minus infinity for rows before the one that a key is seen from; ``row`` and ``column`` broadcast."""
    if not KNOWN:
        scores = tl.where(row >= tl.load(SINCE + column, mask=column < S, other=0), scores, float("-inf"))
    return scores


@triton.jit
def _attend_range(
    q, top, total, acc, keys, biases, farthest, batch, head, start, T, to_base_2,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BIAS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and weighted values of a tile of queries, after one more range of keys."""
    K, V, k_batch, k_head, k_row, v_batch, v_head, v_row, group, S, low, high, every, ahead, SINCE = keys
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    row = start + tl.arange(0, ROWS)
    first, inner, near, past, outer, last = _tiles_of_rows(
        start, T, S, low, high, ahead, farthest, ROWS, COLUMNS, LOW, HIGH, BIAS
    )
    factor = to_base_2
    if BIAS != PLAIN:
        factor = 1.0
    for part in tl.static_range(2):  # inside the range, then its edges, which alone need a mask
        for step in range(0, _count(first, inner, near, past, outer, last, part == 1)):
            tile = _tile(step, first, inner, near, past, outer, part == 1, BIAS)
            k = _held(K, tile * COLUMNS, k_row, S, COLUMNS, D, WIDTH, CHUNK)
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            scores = _biased(
                _product(q, k, ROWS, COLUMNS, D, WIDTH, CHUNK), biases, farthest, row[:, None], column[None, :], start,
                tile * COLUMNS, every, ahead, to_base_2, part == 1, BIAS,
            )  # fmt: skip
            scores = _risen(scores, row[:, None], column[None, :], S, SINCE, KNOWN)
            if part == 1:
                scores = _seen(scores, row, column, S, low, high, LOW, HIGH)
            top, total, p, shrink = _online(top, total, scores, factor)
            v = _load(V, tile * COLUMNS, v_row, S, COLUMNS, D, WIDTH)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
    return top, total, acc


@triton.jit
def forward_kernel(
    Q, OUT, LSE, BIASES, ranges, q_batch, q_head, q_row, o_batch, o_head, o_row, heads, T, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KINDS: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries. Grid: tiles of queries, batch x heads."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # causal: the rows with most keys begin first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q = _held(Q + batch * q_batch + head * q_head, start, q_row, T, ROWS, D, WIDTH, CHUNK)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum and sum, in units of base 2
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    biases = BIASES + head * (2 * farthest + 1)
    for which in tl.static_range(RANGES):
        top, total, acc = _attend_range(
            q, top, total, acc, ranges[which], biases, farthest, batch, head, start, T, scale * LOG2_E,
            D, WIDTH, CHUNK, ROWS, COLUMNS, KINDS[which][0], KINDS[which][1], KINDS[which][2], KINDS[which][3],
        )  # fmt: skip
    out = _mean(total, acc)
    _store(OUT + batch * o_batch + head * o_head, start, o_row, T, out, ROWS, D, WIDTH)
    lse = _log_sum(top, total)
    row = start + tl.arange(0, ROWS)
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + row, lse, mask=row < T)


@triton.jit
def _dq_range(
    acc, q, grad, lse, delta, keys, biases, farthest, batch, head, start, T, to_base_2,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BIAS: tl.constexpr, KNOWN: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, before the scale, with what one range of keys adds."""
    K, V, k_batch, k_head, k_row, v_batch, v_head, v_row, group, S, low, high, every, ahead, SINCE = keys
    K += batch * k_batch + head // group * k_head
    V += batch * v_batch + head // group * v_head
    row = start + tl.arange(0, ROWS)
    first, inner, near, past, outer, last = _tiles_of_rows(
        start, T, S, low, high, ahead, farthest, ROWS, COLUMNS, LOW, HIGH, BIAS
    )
    factor = to_base_2
    if BIAS != PLAIN:
        factor = 1.0
    for part in tl.static_range(2):
        for step in range(0, _count(first, inner, near, past, outer, last, part == 1)):
            tile = _tile(step, first, inner, near, past, outer, part == 1, BIAS)
            k = _held(K, tile * COLUMNS, k_row, S, COLUMNS, D, WIDTH, CHUNK)
            v = _held(V, tile * COLUMNS, v_row, S, COLUMNS, D, WIDTH, CHUNK)
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            scores = _biased(
                _product(q, k, ROWS, COLUMNS, D, WIDTH, CHUNK), biases, farthest, row[:, None], column[None, :], start,
                tile * COLUMNS, every, ahead, to_base_2, part == 1, BIAS,
            )  # fmt: skip
            scores = _risen(scores, row[:, None], column[None, :], S, SINCE, KNOWN)
            if part == 1:
                scores = _seen(scores, row, column, S, low, high, LOW, HIGH)
            acc = _add_dq(acc, scores, factor, lse, delta, grad, k, v, ROWS, COLUMNS, D, WIDTH, CHUNK)
    return acc


@triton.jit
def dq_kernel(
    Q, OUT, GRAD, LSE, GRAD_LSE, DELTA, BIASES, DQ, ranges, q_batch, q_head, q_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, dq_batch, dq_head, dq_row, heads, T, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KINDS: tl.constexpr, RANGES: tl.constexpr, THROUGH_LSE: tl.constexpr,
):  # fmt: skip
    """Gradient dQ of one tile of queries, and for ``dkv_kernel`` the row sums of ``grad * output``. Grid as forward."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    of_rows = tl.program_id(1).to(tl.int64) * T
    row = start + tl.arange(0, ROWS)
    q = _held(Q + batch * q_batch + head * q_head, start, q_row, T, ROWS, D, WIDTH, CHUNK)
    grad = _held(GRAD + batch * g_batch + head * g_head, start, g_row, T, ROWS, D, WIDTH, CHUNK)
    o = _load(OUT + batch * o_batch + head * o_head, start, o_row, T, ROWS, D, WIDTH)
    delta = tl.sum(_whole(grad, ROWS, D, WIDTH, CHUNK).to(tl.float32) * o.to(tl.float32), 1)
    if THROUGH_LSE:
        delta -= tl.load(GRAD_LSE + of_rows + row, mask=row < T, other=0.0)
    tl.store(DELTA + of_rows + row, delta, mask=row < T)
    lse = _lse(LSE + of_rows, row, T)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    biases = BIASES + head * (2 * farthest + 1)
    for which in tl.static_range(RANGES):
        acc = _dq_range(
            acc, q, grad, lse, delta, ranges[which], biases, farthest, batch, head, start, T, scale * LOG2_E,
            D, WIDTH, CHUNK, ROWS, COLUMNS, KINDS[which][0], KINDS[which][1], KINDS[which][2], KINDS[which][3],
        )  # fmt: skip
    _store(DQ + batch * dq_batch + head * dq_head, start, dq_row, T, acc * scale, ROWS, D, WIDTH)


@triton.jit
def dkv_kernel(
    Q, GRAD, LSE, DELTA, BIASES, DK, DV, keys, q_batch, q_head, q_row, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, T, farthest, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BIAS: tl.constexpr, KNOWN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients dK and dV of one tile of keys over the GROUP query heads that share it; scores: ``[COLUMNS, ROWS]``.

    Grid: tiles of keys, batch x heads of the keys.
    """
    K, V, k_batch, k_head, k_row, v_batch, v_head, v_row, _group, S, low, high, every, ahead, SINCE = keys
    start = tl.program_id(0) * COLUMNS  # causal: the keys that most queries see begin first
    shared = heads // GROUP
    batch, head = (tl.program_id(1) // shared).to(tl.int64), (tl.program_id(1) % shared).to(tl.int64)
    column = start + tl.arange(0, COLUMNS)
    k = _held(K + batch * k_batch + head * k_head, start, k_row, S, COLUMNS, D, WIDTH, CHUNK)
    v = _held(V + batch * v_batch + head * v_head, start, v_row, S, COLUMNS, D, WIDTH, CHUNK)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH], tl.float32)
    first, inner, near, past, outer, last = _tiles_of_keys(
        start, T, S, low, high, ahead, farthest, ROWS, COLUMNS, LOW, HIGH, BIAS
    )
    factor = scale * LOG2_E
    if BIAS != PLAIN:
        factor = 1.0
    for member in range(0, GROUP):
        asking = head * GROUP + member
        queries, grads = Q + batch * q_batch + asking * q_head, GRAD + batch * g_batch + asking * g_head
        of_rows = (batch * heads + asking) * T
        biases = BIASES + asking * (2 * farthest + 1)
        for part in tl.static_range(2):
            for step in range(0, _count(first, inner, near, past, outer, last, part == 1)):
                tile = _tile(step, first, inner, near, past, outer, part == 1, BIAS)
                row = tile * ROWS + tl.arange(0, ROWS)
                q = _held(queries, tile * ROWS, q_row, T, ROWS, D, WIDTH, CHUNK)
                grad = _held(grads, tile * ROWS, g_row, T, ROWS, D, WIDTH, CHUNK)
                lse = _lse(LSE + of_rows, row, T)
                delta = tl.load(DELTA + of_rows + row, mask=row < T, other=0.0)
                scores = _biased(
                    _product(k, q, COLUMNS, ROWS, D, WIDTH, CHUNK), biases, farthest, row[None, :], column[:, None],
                    tile * ROWS, start, every, ahead, scale * LOG2_E, part == 1, BIAS,
                )  # fmt: skip
                scores = _risen(scores, row[None, :], column[:, None], S, SINCE, KNOWN)
                if part == 1:
                    scores = _seen_by(scores, row, column, T, low, high, LOW, HIGH)
                dk, dv = _add_dkv(dk, dv, scores, factor, lse, delta, q, grad, v, ROWS, COLUMNS, D, WIDTH, CHUNK)
    _store(DK + batch * dk_batch + head * dk_head, start, dk_row, S, dk * scale, COLUMNS, D, WIDTH)
    _store(DV + batch * dv_batch + head * dv_head, start, dv_row, S, dv, COLUMNS, D, WIDTH)
