"""Allocator peaks of the segment-recurrent transformer: what is alive together at the worst moment.

A row is ``B n d`` elements of n tokens or items. ``impl`` is ``reference``, ``slabs``, or how ``blocked`` aligns its
queries with the keys: ``padded`` with rows of zeros, ``masked``, or ``visible`` where a query comes alone; ``triton``
needs neither.
"""

from __future__ import annotations

from sympy import Expr, Integer, Min, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.products_forms import backward_scratch, mask, scratch
from ctxbench.implementations.segment_recurrent.sizes import ADDED, REST, WHOLE, S, items_after, sum_of_items


def peak(impl: str, mode: str) -> Expr:
    """Bytes in one mode of ``reference``, ``slabs``, or ``blocked`` as it aligns its queries: see ``cost``."""
    if mode == "train":
        return _train(impl)
    return {"forward": _forward, "stream": _stream, "decode": _decode}[mode](impl)


def row(rows: Expr | int) -> Expr:
    """Bytes of that many rows of every batch item."""
    return tensor(B, rows, d)


def some(count: Expr | int) -> Expr:
    """1 where there are any, else 0."""
    return Min(sympify(count), 1)


def _mixing(impl: str, n: Expr | int, m: Expr) -> Expr:
    """Inside the first look, beside queries, keys and values: scores and mask, or the result behind padded queries."""
    if impl == "triton":
        return row(n) + 4 * B * h * n
    if impl in ("masked", "visible"):
        return row(n) + 4 * B * h * n + some(n - 1) * some(m) * (e + 1) * n * (m + n)  # booleans, and in the dtype
    if impl == "slabs":
        return row(n)
    if impl == "padded":
        return some(n - 1) * 2 * row(m + n) + (1 - some(n - 1)) * row(n) + 4 * B * h * (m + n)
    return 2 * tensor(B, h, n, m + n) + largest(row(n), n * (m + n))


def _piece(impl: str, n: Expr | int, m: Expr, items: Expr, begins: bool) -> Expr:
    """A piece of n tokens after m rows that they see, ``items`` of them memory, projected anew where it ``begins``."""
    made = 4 * row(items) if begins else row(0)
    both = made + 2 * row(n if impl == "triton" and begins else m + n)  # a whole segment is joined to nothing
    stages = [both + 3 * row(n), both + row(n) + _mixing(impl, n, m), both + when_ffn(row(n) + 2 * tensor(B, n, f))]
    if impl == "reference":  # strided heads of several rows cannot be one batch of matrices
        stages.append(both + 3 * row(n) + 2 * tensor(B, h, n, items) + some(B - 1) * row(items))
    if impl == "slabs":  # the residual of the second look, beside its queries and what it found
        stages.append(both + some(items) * 5 * row(n))
    return largest(*stages)


def _kept(impl: str, n: Expr | int, m: Expr) -> Expr:
    """Buffers of slabs, which both looks of all segments share: for n tokens that see m items."""
    if impl != "slabs":
        return Integer(0)
    return mask(n) + largest(scratch(n, m + n, masked=False), some(m) * scratch(n, m, causal=False))


def _forward(impl: str) -> Expr:
    """Outputs of one layer's segments collect and are joined; its input is that of the layer below."""
    written = floor((T - 1) / S)
    rest = T - S * written

    def at(segment: Expr, n: Expr) -> Expr:
        m = items_after(segment)
        return row(S * segment) + row(m) + _piece(impl, n, m, m, begins=True)

    before = some(written) * _kept(impl, S, items_after(written - 1))
    kept = largest(before, _kept(impl, rest, items_after(written)))
    return some(L - 1) * row(T) + largest(
        some(written) * at(written - 1, S) + before, at(written, rest) + kept, some(written) * 2 * row(T)
    )


def _stream(impl: str) -> Expr:
    """A call holds the outputs of the one before it, all layers' old memories and the new states of those below."""
    last, before = items_after(WHOLE), items_after(WHOLE - 1)
    tail = REST - Min(REST, S - ADDED)
    whole = some(WHOLE - 1) * row(S) + row(L * before + (L - 1) * last) + _piece(impl, S, before, before, begins=True)
    rest = (
        some(WHOLE) * row(S)
        + row(L * last + (L - 1) * (4 * last + 2 * REST + tail))
        + _piece(impl, REST, last, last, begins=True)
    )
    whole, rest = whole + _kept(impl, S, before), rest + _kept(impl, REST, last)
    carried = some(L - 1)
    return largest(some(WHOLE) * (whole + carried * row(S)), some(REST) * (rest + carried * row(REST)))


def _decode(impl: str) -> Expr:
    """One token: it begins its segment and projects the memory, or continues one and copies its keys and values."""
    m, begins = items_after(WHOLE), 1 - some(REST)
    ends = floor((T + 1) / S) - WHOLE
    known = m + REST
    tail = (REST + 1) - Min(REST + 1, S - ADDED)
    kept = (L - 1) * ((1 - ends) * (begins * 4 * row(m) + (1 - begins) * 2 * row(known) + 2 * row(1) + row(tail)))
    fresh, continued = _piece(impl, 1, m, m, begins=True), _piece(impl, 1, known, m, begins=False)
    remembering = ends * (2 * row(known + 1) + begins * 4 * row(m) + row(3 * ADDED + items_after(WHOLE + 1)))
    kept = kept + ends * (L - 1) * row(items_after(WHOLE + 1))
    return kept + largest(begins * fresh, (1 - begins) * continued, remembering)


def _train(impl: str) -> Expr:
    """What backward needs of all segments while the last layer's outputs are joined, or it is in the last softmax."""
    written = floor((T - 1) / S)
    rest = T - S * written
    items, last = sum_of_items(written), items_after(written)
    squares = S * (S * written + items)
    scored = S * items
    first = some(written) * S
    final = _saved(impl, rest, last, rest * (rest + last), rest * last, (1 - some(written)) * rest)
    saved = (
        _saved(impl, S * written, items, squares, scored, first)
        + final
        + written * row(2 * ADDED + 1)
        + row(sum_of_items(written + 1))
    )
    saved = saved + some(B - 1) * row(T)  # segments of several rows are copied
    if impl == "padded":
        saved = saved + some(B - 1) * row(T - Min(T, S))  # and so are results behind padded queries
    joined = L * saved + (L - 1) * row(T) + (1 + some(written)) * row(T)
    if impl not in ("reference", "slabs"):
        return joined
    inside, maps = (_softmax, 0) if impl == "reference" else (_buffers, 3 * e * d * d)  # gradients of maps passed by
    earlier = row(rest) - final + inside(S, items_after(written - 1)) + 8 * e * d * d
    return largest(joined, L * saved + L * row(T) + largest(inside(rest, last) + maps, some(written) * earlier))


def _softmax(n: Expr, m: Expr) -> Expr:
    """Two gradients of scores, those of weights and of the residual; what came after in the layer is free again."""
    later = 2 * row(n + m) + tensor(B, h, n, m) + 3 * row(n) + 16 * B * n
    network = when_ffn(row(n) + 2 * tensor(B, n, f) + 8 * B * n - 2 * e * d * f)
    return 2 * tensor(B, h, n, m + n) + row(n) - later - network


def _buffers(n: Expr, m: Expr) -> Expr:
    """In place of two gradients of scores: buffers, and gradients of queries, keys, values and what was mixed."""
    second = some(m) * (2 * row(n + m) + row(n))
    network = when_ffn(2 * row(n) + 2 * tensor(B, n, f) + 8 * B * n - 2 * e * d * f)
    made = backward_scratch(n, n + m) + 2 * row(n) + 2 * row(n + m) + 2 * row(m)
    return made - second - 2 * row(n) - 16 * B * n - network


def _saved(impl: str, n: Expr, m: Expr, pairs: Expr, second: Expr, first: Expr) -> Expr:
    """Of n tokens in one layer that find m items altogether; ``first`` of them are in a segment without memory.

    Both looks: queries, keys, values, result, and scores with a mask or their log-sum; in and out of the norms.
    """
    later = n - first
    second_look = 2 * row(later + m) + 4 * B * h * later
    if impl == "padded":
        looks = 4 * row(n + m) + 4 * B * h * (n + m) + second_look
    elif impl != "reference":
        mask = e * (pairs - first**2) if impl == "masked" else 0
        looks = 2 * row(n + m) + 2 * row(n) + 4 * B * h * n + mask + second_look
        if impl == "slabs":  # without their log-sums
            looks = looks - 4 * B * h * (n + later)
    else:
        looks = 2 * row(n + m) + 2 * row(n) + tensor(B, h, pairs) + pairs + 2 * row(later + m) + tensor(B, h, second)
    norms = 2 * row(n) + row(later) + 16 * B * n
    network = when_ffn(2 * row(n) + 2 * tensor(B, n, f) + 8 * B * n)
    return looks + norms + network
