"""Allocator peaks of ``blocked`` and ``native`` where something outlives a call or a layer: states, what is trained.

A state is a value, so a call holds the old one whole and of the new one what its layers so far have made. See
``peak_parts`` for the words.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.biased_window_forms import BLOCK, ramp, window_parameters
from ctxbench.implementations._shared.forms import block_parameters, position_parameters
from ctxbench.implementations.memorizing.params import FROM_TOP, MemorizingParams
from ctxbench.implementations.memorizing.peak_parts import (
    BATCHED,
    REST,
    WHOLE,
    K,
    M,
    S,
    W,
    bias_of_band,
    fills,
    row,
    scores_of_band,
    slabs,
    some,
    there,
)
from ctxbench.implementations.memorizing.sizes import FEW, PANEL, ROWS

BELOW = Max(L - FROM_TOP, 0)  # layers below the one with the memory
WEIGHTS = e * block_parameters(window_parameters()) / L  # of a layer
R = row(T)


def packed(n: Expr | int, m: Expr) -> Expr:
    """The keys of one head as ``native`` packs them for n queries."""
    return some(sympify(n) - FEW) * ceiling(m / PANEL) * PANEL * d / h * Max(e, 4)


def stream(impl: str, params: MemorizingParams, position: str) -> Expr:
    """The last layer of a call, its search or its network: of the last whole segment, or of what follows it."""
    selects, pairs = _selects(params), Min(M, WHOLE * S)
    if impl == "native" or not selects:
        before = Min(M, Max(WHOLE - 1, 0) * S)
        search = (packed(S, before), packed(REST, pairs)) if selects else (4 * B * h * S, 4 * B * h * REST)
        whole, rest = (row(n) + each for n, each in zip((S, REST), search, strict=True))
        moments = [_call(impl, params, position, S, whole), _call(impl, params, position, REST, rest)]
    else:
        moments = [_call(impl, params, position, S, Integer(0)), _call(impl, params, position, REST, Integer(0))]
        for filled, m, full in fills(params):
            begin = (largest(filled, WHOLE - 1) if full else Integer(filled)) * S
            slab = _call(impl, params, position, S, slabs(S, m, params.top_k, copied=False), begin)
            moments.append(some(WHOLE - filled) * slab)
            slab = _call(impl, params, position, REST, slabs(largest(REST, 1), m, params.top_k, copied=False))
            moments.append(there(filled, full) * slab)
    return largest(*moments)


def _call(
    impl: str, params: MemorizingParams, position: str, n: Expr, lookup: Expr, begin: Expr | None = None
) -> Expr:  # fmt: skip
    """Of n tokens after ``begin``; ``lookup``: bytes of the search, what it finds included."""
    whole = n == S
    if begin is None:
        begin = Max(WHOLE - 1, 0) * S if whole else WHOLE * S
    old, recent = Min(begin, W - 1), Min(begin + n, W - 1)
    own = recent if whole or not params.memory_len else Min(begin + n, Max(n, W - 1))
    written = 2 * row(own) + (2 * row(Min(M, begin + n)) if whole else 0)
    held = 2 * row(Min(M, begin)) + 2 * L * row(old) + some(begin) * row(S)
    joined = 2 * row(n) + 2 * row(old + n)  # the norm, queries, keys and values
    unit = 6 * row(n) + 2 * tensor(B, h, n)  # while keys become unit vectors
    strided = 2 * row(n) * BATCHED * (1 - some(old))  # keys and values that nothing was joined to
    window = joined + row(n) + _window(impl, position, n, old)
    mixing = largest(unit, 2 * row(n) + joined, window)
    memory = largest(mixing, joined + 3 * row(n), joined + row(n) + lookup, joined + row(n) + written)
    if impl == "blocked":
        memory = largest(memory, window + strided)
    below = BELOW * 2 * row(recent) + some(BELOW) * row(n)
    above = written + (L - 2) * 2 * row(recent) + row(n) + largest(mixing, joined + row(n) + 2 * row(recent))
    feed = written + (L - 1) * 2 * row(recent) + (some(L - 1) + 2) * row(n) + 2 * tensor(B, n, f)
    return some(WHOLE if whole else n) * (held + largest(below + memory, some(L - 1) * above, when_ffn(feed)))


def _window(impl: str, position: str, n: Expr, past: Expr) -> Expr:
    """Inside the window of n queries, beside a row of results: the bias, and scores and queries, or log-sum-exps."""
    if impl == "native":
        return (1 if position == "none" else 5) * tensor(h, W) + 4 * B * h * n  # of distances, turned round and padded
    used = largest(tensor(h, W) - row(n), 2 * scores_of_band(n, past + n))  # the bias, turned round, or in scores
    return tensor(h, W) + bias_of_band(n) + BATCHED * row(n) + used


def decode(impl: str, params: MemorizingParams, position: str) -> Expr:
    """Joined keys and values of the recent tokens, and their copies, or the window, or the search.

    In a stack of several layers the last one has no memory: the states of all below it are then held beside its own.
    """
    phase = REST if params.memory_len else Integer(0)
    past, local = Min(T, largest(phase, W - 1)), 2 * row(Min(T + 1, W - 1))
    ends = (WHOLE_AFTER - WHOLE) if params.memory_len else Integer(0)
    kept = 2 * row(Min(T + 1, largest((1 - ends) * (phase + 1), W - 1))) + ends * 2 * row(Min(M, WHOLE * S + S))
    moments = [kept + 3 * row(1), 5 * row(1), 3 * row(1) + _window(impl, position, Integer(1), past)]
    if impl == "blocked" and _selects(params):
        for filled, m, full in fills(params):
            moments.append(there(filled, full) * (3 * row(1) + slabs(1, m, params.top_k, copied=False)))
    memory = BELOW * local + some(BELOW) * row(1) + 2 * row(past + 1) + largest(*moments)
    own = largest(local + 3 * row(1), 3 * row(1) + _window(impl, position, Integer(1), Min(T, W - 1)))
    above = kept + (L - 2) * local + row(1) + 2 * row(Min(T, W - 1) + 1) + own
    feed = kept + (L - 1) * local + (some(L - 1) + 2) * row(1) + 2 * tensor(B, f)
    return largest(memory, some(L - 1) * above, when_ffn(feed))


WHOLE_AFTER = (T + 1 - (T + 1) % S) / S  # whole segments with the token that is decoded


def train(impl: str, params: MemorizingParams, position: str) -> Expr | None:
    """Backward through the top layer's network, a band of the window, or a lookup; or the slab of a lookup before.

    None where segments may have so few pairs that nothing is searched: other kernels then keep other things.
    """
    if not _selects(params) or params.top_k >= params.segment_len:
        return None
    return _Training(impl, params, position).peak()


class _Training:
    """Bytes that layers keep for the backward pass, and beside them."""

    def __init__(self, impl: str, params: MemorizingParams, position: str):
        self.impl, self.params, self.position = impl, params, position
        statistics = 2 * e * B * T
        common = statistics + 4 * tensor(B, h, T) + bias_of_band(T) + (8 * W if position == "t5" else 0)
        self.local = 8 * R + common  # norm, q, k and v, both unit, queries scaled, what was mixed
        self.memory = 10 * R + common  # the window's result, and what was found, besides
        self.network = when_ffn(2 * R + 2 * tensor(B, T, f) + statistics)

    def peak(self) -> Expr:
        layer = self.local + self.network + R
        everything = (L - 1) * layer + self.memory + self.found(T) + self.network + R
        top = everything + when_ffn(tensor(B, T, f) + e * d * f + e * d)
        after = when_ffn(R + 3 * e * d + e * f + 2 * e * d * f)  # gradients that the network leaves
        lower = (L - 2) * layer + self.memory + self.found(T) + self.network + R
        above = some(L - 1) * (lower + self.local + R + after + e * d * d + self.band(R))
        higher = largest(after, some(L - 1) * (R + (L - BELOW - 1) * WEIGHTS + after - when_ffn(R)))
        memory = BELOW * layer + self.memory + R + higher + e * d * d
        unasked = (some(T - S) - 1) * R if self.impl == "blocked" else Integer(0)  # no gradient of no lookup
        last = memory + largest(self.found(T) + self.lookups(), self.band(unasked))
        end = L * WEIGHTS + e * position_parameters(self.position) + 4 * R
        return largest(top, above, last, end, *self.slabs(BELOW * layer))

    def band(self, own: Expr) -> Expr:
        """A block of the window's backward pass beside the layer; ``own``: a row where nothing else was freed."""
        block, wide = Min(BLOCK, T), Max(e, 4)
        return own + 2 * wide * B * T * d + wide * h * block * (W - 1 + block) + 3 * scores_of_band(T, T)

    def found(self, end: Expr) -> Expr:
        """What lookups of the tokens before ``end``, a whole number of segments or all, keep of what they chose."""
        chosen = (4 + e) * B * h * K
        if self.impl == "native":
            return chosen * T + BATCHED * 2 * R
        whole, ragged = (WHOLE, some(REST)) if end == T else (end / S, Integer(0))
        pairs = ramp(whole, S, M) + ragged * Min(WHOLE * S, M)
        return chosen * Max(end - S, 0) + BATCHED * 2 * row(pairs)

    def lookups(self) -> Expr:
        """The gate's backward pass, or that of a lookup: of all segments, or of the last but one and its sum."""
        if self.impl == "native":
            n = Max(T - S, 0)
            return largest(2 * R, R + row(n) + BATCHED * (2 * R + row(n)) + self.gradient(n))
        last = Piecewise((REST, REST > 0), (S, True))
        several = some(T - last - S)  # lookups before the last one
        freed = self.found(T) - self.found(T - last)
        before = self.found(T - last) - self.found(Max(T - last - S, 0))
        one = some(T - S) * (row(last) + BATCHED * row(last) + self.gradient(last))
        other = several * (R + row(S) + BATCHED * row(S) + self.gradient(S) - freed)
        return largest(2 * R, one, other, several * (3 * R - freed - before))

    def gradient(self, n: Expr) -> Expr:
        """Of the queries of one head, the one before it still there: values as picked, weights, a weighted bag."""
        rows = Min(n, ROWS) * K * d / h * e
        return 2 * n * K * e + rows + largest(rows, n * (d / h * e + 24))

    def slabs(self, below: Expr) -> list[Expr]:
        """The forward pass of ``blocked`` in a lookup of a whole segment or of what follows the last."""
        if self.impl == "native":
            return []
        known = below + self.memory - R + BATCHED * 3 * R
        moments: list[Expr] = []
        for filled, m, full in fills(self.params):
            begin = (largest(filled, WHOLE - 1) if full else Integer(filled)) * S
            slab = known + row(begin) + self.found(begin) + slabs(S, m, self.params.top_k)
            moments.append(some(WHOLE - filled) * slab)
            slab = known + row(WHOLE * S) + self.found(WHOLE * S) + slabs(largest(REST, 1), m, self.params.top_k)
            moments.append(some(REST) * there(filled, full) * slab)
        return moments


def _selects(params: MemorizingParams) -> bool:
    return params.lookup == "topk" and params.top_k < params.memory_len
