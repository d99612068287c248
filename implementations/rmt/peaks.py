"""Allocator peaks of the recurrent memory transformer: what is alive together at the worst moment.

A row is ``B n d`` elements of n rows of a segment. Nothing is left out but single values and, beside activations,
the smallest weights.
"""

from __future__ import annotations

from sympy import Expr, Integer, Min, Mod, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.forms import rotating
from ctxbench.implementations._shared.products_forms import backward_scratch, mask, scratch

M = param("num_memory")
S = param("segment_len")
WHOLE = floor(T / S)
REST = Mod(T, S)
FUSED = ("blocked", "triton")


def peak(impl: str, mode: str, full: bool, rotates: bool = False) -> Expr:
    """Bytes of one impl in one mode; ``triton`` has neither parts to join, as the mask ``full`` has, nor masks."""
    full = full and impl != "triton"
    if mode == "decode":
        return _decode(impl, full, rotates)
    if mode == "stream":
        return _stream(impl, full, rotates)
    return _forward(impl, full, rotates) if mode == "forward" else _train(impl, full)


def row(rows: Expr | int) -> Expr:
    """Bytes of that many rows of every batch item."""
    return tensor(B, rows, d)


def some(count: Expr | int) -> Expr:
    """1 where there are any, else 0."""
    return Min(sympify(count), 1)


def _mixing(impl: str, n: Expr, K: Expr, full: bool, fresh: bool) -> Expr:
    """Inside the attention operator, beside queries, keys and values: scores, or the result and its parts.

    ``fresh``: keys and values are the piece's own, so it has read tokens, and heads lie strided.
    """
    if impl != "reference":
        joined = row(2 * n + (M if fresh else 0)) if full else row(n)
        return largest(joined, row(n) + (0 if impl == "slabs" else 4 * B * h * n))
    copied = some(B - 1) * row(K) if fresh else Integer(0)  # strided heads of several rows: no batch of matrices
    return 2 * tensor(B, h, n, K) + largest(row(n) + copied, n * K)


def _piece(impl: str, full: bool, n: Expr, left: Expr, rotates: bool, kept: Expr | int = 0) -> Expr:
    """A piece that begins its segment: n rows go in, ``left`` of them come out of the top layer.

    The input lives through a layer, and so do keys and values; ``kept`` are those of the layers below.
    """
    mixing = 4 * row(n) + _mixing(impl, n, n, full, fresh=True)
    below = some(L - 1) * largest(6 * row(n), when_ffn(5 * row(n) + 2 * tensor(B, n, f)))
    top = largest(4 * row(n) + 2 * row(left), when_ffn(3 * row(n) + 2 * row(left) + 2 * tensor(B, left, f)))
    return kept + largest(mixing, top, below, *[rotating(n)] * rotates)  # the input in place of its norm


def _kept(impl: str, full: bool, body: Expr, writes: Expr) -> Expr:
    """Buffers of slabs, which all segments share: of one with ``body`` rows, the reads among them, before its writes.

    ``full``: each group of memory tokens is a call of its own.
    """
    if impl != "slabs":
        return Integer(0)
    if not full:
        return scratch(body + writes, body + writes)
    corners = [scratch(M, M, causal=False), some(writes) * scratch(writes, body + writes, causal=False)]
    return mask(body) + largest(scratch(body, body, masked=False), *corners)


def _forward(impl: str, full: bool, rotates: bool) -> Expr:
    """All outputs have their place, and the rows of the segment before are there with what its write tokens say."""
    written = floor((T - 1) / S)
    rest = T - S * written
    before = row(T) + row(S + M)
    segment = some(written - 1) * before + _piece(impl, full, S + 2 * M, S + M, rotates)
    last = some(written) * before + _piece(impl, full, M + rest, rest, rotates)
    kept = [some(written) * _kept(impl, full, S + M, M), _kept(impl, full, M + rest, Integer(0))]
    return largest(some(written) * segment + kept[0], last + largest(*kept))


def _stream(impl: str, full: bool, rotates: bool) -> Expr:
    """A call holds the outputs of the one before it and the memory that came in."""
    whole = some(WHOLE - 1) * row(S + M) + row(M) + _piece(impl, full, S + 2 * M, S + M, rotates)
    kept = (L - 1) * 2 * row(M + REST)
    rest = some(WHOLE) * row(S + M) + row(M) + _piece(impl, full, M + REST, REST, rotates, kept)
    kept = [_kept(impl, full, S + M, M), _kept(impl, full, M + REST, Integer(0))]
    return largest(some(WHOLE) * (whole + kept[0]), some(REST) * (rest + kept[1]))


def _decode(impl: str, full: bool, rotates: bool) -> Expr:
    """One token: it begins its segment with the read tokens, or continues one and copies its keys and values."""
    ends = floor((T + 1) / S) - WHOLE
    n, K = 1 + M * ends, M + REST + 1 + M * ends
    fresh = _piece(impl, full, M + n, n, rotates, (1 - ends) * (L - 1) * 2 * row(M + n))
    operator = _mixing(impl, n, K, full, fresh=False)
    if impl == "blocked" and not full:
        operator = operator + ends * (e + 1) * n * K  # a mask, and the same in the dtype
    step = largest(3 * row(n) + operator, 4 * row(n), when_ffn(3 * row(n) + 2 * tensor(B, n, f)))
    continued = 2 * row(K) * (1 + (1 - ends) * (L - 1)) + largest(row(n) + step, row(M) + (1 - ends) * row(n))
    if rotates:
        continued = largest(continued, rotating(n))  # before keys are joined
    begins = 1 - some(REST)
    return begins * fresh + some(REST) * continued


def _train(impl: str, full: bool) -> Expr:
    """What backward needs of all segments while the outputs are joined; in ``reference`` also while it is in a softmax.

    Backward begins with the last segment; of the segments after the one it is in, inputs' gradients are left.
    """
    written = floor((T - 1) / S)
    rest = T - S * written
    whole = _saved(impl, full, S + 2 * M, S + M)
    saved = written * whole + _saved(impl, full, M + rest, rest)
    joined = saved + some(written) * row(T + M * written) + row(T)
    if impl in FUSED:
        return joined
    top = e * d * d + when_ffn(2 * e * d * f)  # gradients of weights, as far as they are there
    last = saved + row(T) + _softmax(impl, M + rest, rest) + top
    earlier = written * whole + row(T) + row(M + rest) + _softmax(impl, S + 2 * M, S + M) + L * (top + 3 * e * d * d)
    return largest(joined, last, some(written) * earlier)


def _softmax(impl: str, n: Expr, left: Expr) -> Expr:
    """Two gradients of scores and one of the residual; what the layer's later part had kept is free again.

    Slabs have buffers in place of the first two, and gradients of what was mixed and of queries, keys and values.
    """
    made = 4 * row(n) + backward_scratch(n, n) if impl == "slabs" else 2 * tensor(B, h, n, n)
    return made + row(left) - 2 * row(left) - _network(left) - 8 * B * left


def _network(rows: Expr) -> Expr:
    """Saved by a network and its norm: two rows, two hidden ones, mean and deviation."""
    return when_ffn(2 * row(rows) + 2 * tensor(B, rows, f) + 8 * B * rows)


def _saved(impl: str, full: bool, n: Expr, left: Expr) -> Expr:
    """Of one segment: every layer's input, its norm, q, k, v and what was mixed, the networks, the final norm."""
    mixing = 6 * row(n) + 8 * B * n
    if impl == "reference":
        mixing = mixing + tensor(B, h, n, n) + n**2
        unread = row(n - left)  # what was mixed is copied without them
    elif impl == "slabs":
        unread = Integer(0)
    else:
        mixing = mixing + 4 * B * h * n + (row(n + M) + 4 * B * h * M if full else 0)
        unread = Integer(0)
    return L * mixing + (L - 1) * _network(n) + _network(left) - unread + row(left) + 8 * B * left
