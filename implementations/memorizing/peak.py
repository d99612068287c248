"""Closed forms of the allocator peak: what is alive together at the worst moment of each mode.

A row is one ``[B, T, d]`` tensor. Of a segment, ``topk`` holds three score tensors (scores, zeros, weights), ``dense``
two.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, ceiling, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.biased_window_forms import block_pairs
from ctxbench.implementations._shared.forms import stack_peak
from ctxbench.implementations.memorizing.params import FROM_TOP, MemorizingParams
from ctxbench.implementations.memorizing.peak_calls import decode, stream, train
from ctxbench.implementations.memorizing.peak_parts import (
    REST,
    WHOLE,
    K,
    M,
    S,
    W,
    bias_of_band,
    row,
    scores_of_band,
    slabs,
)
from ctxbench.implementations.memorizing.sizes import FEW, PANEL


def peak(impl: str, mode: str, params: MemorizingParams, position: str) -> Expr | None:
    """Bytes above parameters, inputs and incoming state; None where no formula is known."""
    if impl == "triton":
        return _kernels_forward(params) if mode == "forward" else None
    selects = params.lookup == "topk" and params.top_k < params.memory_len
    if impl != "reference" and mode == "train":
        return train(impl, params, position)
    if impl != "reference" and mode != "forward":
        return (stream if mode == "stream" else decode)(impl, params, position)
    if mode == "decode":
        return _decode()
    if impl == "native":
        return _native_forward(params, position) if selects else None
    if impl == "blocked":
        return _blocked_forward(params) if selects else None
    if mode == "forward":
        return _forward(selects)
    if mode == "stream":
        return _stream(selects)
    return _train() if selects else None


def _lookup(n: Expr | int, m: Expr, selects: bool) -> Expr:
    """Scores of n queries against m pairs; what was selected: values, weights, indices."""
    chosen = (2 * e + 8) * B * h * sympify(n) * K if selects else Integer(0)
    return (3 if selects else 2) * tensor(B, h, n, m) + chosen


def _window(n: Expr, keys: Expr) -> Expr:
    """Scores, the bias of every pair and their sum, with distances as integers; or before the sum, with those twice."""
    scores, bias, integers = tensor(B, h, n, keys), tensor(h, n, keys), 8 * n * keys
    return tensor(h, W) + largest(2 * scores + bias + integers, scores + bias + 2 * integers)


def _segments(worst: object) -> Expr:
    """The larger of ``worst(first token, queries, pairs in memory)`` over the last whole segment and the rest."""
    whole = worst(WHOLE * S - S, S, Min(M, WHOLE * S - S))  # type: ignore[operator]
    return largest(whole, Min(REST, 1) * worst(WHOLE * S, REST, Min(M, WHOLE * S)))  # type: ignore[operator]


def _forward(selects: bool) -> Expr:
    """Norm, queries, keys, values, the local part, what was found so far, and one segment's lookup."""
    memory = _segments(lambda begin, n, m: 5 * row(T) + row(begin) + _lookup(n, m, selects)) + tensor(h)
    pieces = floor(T / W)
    rest = T - pieces * W
    whole = Min(pieces, 1) * (row((pieces - 1) * W) + _window(W, Min(pieces * W, 2 * W - 1)))
    ragged = Min(rest, 1) * (row(pieces * W) + _window(rest, Min(T, rest + W - 1)))
    local = 4 * row(T) + largest(whole, ragged)
    with_memory = largest(memory, local + 2 * tensor(h)) + Min(Max(L - FROM_TOP, 0), 1) * row(T)
    return largest(with_memory, Min(L - 1, 1) * (local + row(T)), stack_peak(T, 7 * row(T)))


def _kernels_forward(params: MemorizingParams) -> Expr:
    """Exactly: making queries and keys unit vectors, the window, or a gate's mixing of it with what was found."""
    window = _window_of_kernels()
    mixing = largest(window, (7 if params.memory_len else 6) * row(T) - min(params.memory_len, 1) * tensor(h))
    return _beside_gate(mixing, largest(6 * row(T) + tensor(B, h, T), Min(L - 1, 1) * window))


def _native_forward(params: MemorizingParams, position: str) -> Expr:
    """The window with its bias, or the gate's mixing, or what a search packs of a head if that is long."""
    window = _window_of_kernels()
    if position != "none":
        window += tensor(h, 2 * W - 1)  # the bias as a table
    packed = Min(1, floor(T / (FEW + 1))) * ceiling(T / PANEL) * PANEL * d / h * Max(e, 4)
    mixing = largest(window, 7 * row(T) - tensor(h), 6 * row(T) + packed - tensor(h))
    return _beside_gate(mixing, largest(6 * row(T) + tensor(B, h, T), Min(L - 1, 1) * window))


def _window_of_kernels() -> Expr:
    """Rows, the log-sum-exps, and the bias; distances are twice there as integers before a bias of zeros is."""
    return largest(5 * row(T) + tensor(h, W) + 4 * B * h * T, 4 * row(T) + 16 * W)


def _beside_gate(mixing: Expr, others: Expr) -> Expr:
    """With the gate and what it leaves; layers above keep a row."""
    with_memory = mixing + 2 * tensor(h) + Min(Max(L - FROM_TOP, 0), 1) * row(T)
    return largest(with_memory, stack_peak(T, others))


def _blocked_forward(params: MemorizingParams) -> Expr:
    """Rows, the local part's band, or the lookup of the worst segment, whose slab matters for short sequences alone."""
    band, with_memory = _band(), Min(Max(L - FROM_TOP, 0), 1) * row(T)
    memory: list[Expr] = []
    full = -(-params.memory_len // params.segment_len)  # segments after which the memory stays as it is
    for filled in range(1, full + 1):
        m = min(params.memory_len, filled * params.segment_len)
        if m <= params.top_k:
            continue
        known = 5 * row(T) + tensor(h)
        last = largest(filled, WHOLE - 1) if filled == full else Integer(filled)
        memory.append(Min(Max(WHOLE - filled, 0), 1) * (known + row(last * S) + slabs(S, m, params.top_k)))
        ragged = Min(REST, 1) * Min(Max(WHOLE - filled + 1, 0), 1)
        ragged *= 1 if filled == full else Min(Max(filled + 1 - WHOLE, 0), 1)
        memory.append(ragged * (known + row(WHOLE * S) + slabs(largest(REST, 1), m, params.top_k)))
    memory.append(band + 2 * tensor(h))  # beside the gate and what it leaves
    above = Min(L - 1, 1) * (band + row(T))
    return largest(stack_peak(T, 7 * row(T) + tensor(h)), above, with_memory + largest(*memory))


def _band() -> Expr:
    """Rows, the bias of a block, and the scores and weights of the worst: the last whole one or what follows it.

    Heads of several batch rows are copied to stand in one line.
    """
    return (5 + 3 * Min(B - 1, 1)) * row(T) + tensor(h, W) + bias_of_band(T) + 2 * scores_of_band(T, T)


def _stream(selects: bool) -> Expr:
    """A call with its state before: norm, queries, local part, joined keys and values; the output before it."""

    def call(begin: Expr, n: Expr, m: Expr) -> Expr:
        recent = Min(begin, W - 1)
        held = 2 * row(m) + 2 * row(recent) + 2 * row(recent + n) + 4 * row(n) + Min(begin, 1) * row(S)
        old = (L - 1) * 2 * row(recent)
        feed = 4 * row(recent) + 2 * row(n) + 2 * tensor(B, n, f) + 2 * row(m) + 2 * row(Min(M, begin + n))
        return old + largest(held + largest(_lookup(n, m, selects), _window(n, recent + n)), when_ffn(feed))

    return _segments(call)


def _decode() -> Expr:
    """Joined keys and values of the recent tokens, and their copies or the scores of the memory.

    In a stack of several layers the last one has no memory: the states of all below it are then held beside its own.
    """
    recent = Min(T, largest(REST, W - 1))
    ends = floor((T + 1) / S) - WHOLE
    joined, kept = 2 * row(recent + 1), 2 * row(Min(T + 1, largest((1 - ends) * (REST + 1), W - 1)))
    kept += ends * 2 * row(Min(M, WHOLE * S + S))
    local = 2 * row(Min(T + 1, W - 1))
    scores = _lookup(1, Min(M, WHOLE * S), selects=True)
    memory = Max(L - FROM_TOP, 0) * local + joined + largest(scores, kept)
    above = Min(L - 1, 1) * (kept + (L - 1) * local + 2 * row(Min(T, W - 1) + 1))
    return largest(memory, above) + 3 * row(1)


def _train() -> Expr:
    """The lookup of the last segment, in the forward pass; or the top layer's network when all layers have saved."""
    local = (tensor(B, h) + 9) * block_pairs(T, W, W)
    chosen = (e + 8) * B * h * T * K
    layer = local + 9 * row(T) + when_ffn(2 * row(T) + 2 * tensor(B, T, f))
    lookup = _segments(lambda begin, n, m: row(begin) + _lookup(n, m, selects=True))
    memory = Max(L - FROM_TOP, 0) * layer + local + chosen + 9 * row(T) + lookup
    return largest(memory, L * layer + chosen + when_ffn(2 * row(T) + tensor(B, T, f)))
