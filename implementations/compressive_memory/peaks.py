"""Allocator peaks of the compressive memory: what is alive together at the worst moment. Derivation in README.md.

A row is ``B n d`` elements of ``n`` tokens or entries.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, f, h
from ctxbench.cost.terms import largest, tensor
from ctxbench.implementations._shared.products_forms import backward_scratch, scratch
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams
from ctxbench.implementations.compressive_memory.sizes import (
    ARRIVING,
    EXTRA,
    PLAIN,
    RATE,
    REST,
    WHOLE,
    C,
    N,
    R,
    S,
    compressions,
    retrieved,
    retrieved_before,
)

SEVERAL = Min(B - 1, 1)  # of a batch of several, strided parts are copied before they are multiplied


def peak(impl: str, mode: str, params: CompressiveMemoryParams) -> Expr | None:
    """Bytes of one impl in one mode; None where no formula is known."""
    compresses = params.compressed_len > 0
    if impl == "triton":
        return _stacked_forward(impl, compresses) if mode == "forward" else None
    if mode == "decode":
        return _decode(compresses)
    if impl != "reference":
        stacked = {"forward": _stacked_forward, "stream": _stacked_stream, "train": _stacked_train}
        return stacked[mode](impl, compresses)
    if mode == "stream":
        return _stream()
    return _forward(compresses) if mode == "forward" else _train(compresses)


def row(tokens: Expr | int) -> Expr:
    """Bytes of ``tokens`` tokens of every batch row."""
    return tensor(B, tokens, d)


def _feed(tokens: Expr | int) -> Expr:
    """The feed-forward network, the layer's residual included."""
    return Piecewise((2 * row(tokens) + 2 * tensor(B, tokens, f), f > 0), (Integer(0), True))


def _memory(begin: Expr) -> Expr:
    """Rows and entries in memory when a segment begins."""
    return Min(begin, R) + Min(C, N * compressions(begin))


def _piece(queries: Expr | int, keys: Expr) -> Expr:
    """Queries, keys, values of a piece, three tensors of scores and their mask."""
    own = 3 * row(queries) + 2 * row(keys)
    return own + 3 * tensor(B, h, queries, keys) + queries * keys


def _forward(compresses: bool) -> Expr:
    """Normed input, outputs so far, and a segment with its memory, which lives on in the tensors it was cut from."""
    begin = (WHOLE - 1) * S
    memory = Min(begin, R + S)
    if compresses:
        memory += Min(N * compressions(begin), C + S / RATE)
    found = N * retrieved(WHOLE - 1)
    segment = row(T) + row(begin) + row(memory) + 2 * row(found) + _piece(S, found + S)
    mixing = largest(Min(WHOLE, 1) * segment, 3 * row(T))
    return largest(mixing, _feed(T)) + Min(L - 1, 1) * row(T)


def _stream() -> Expr:
    """The last layer of a call, in a whole segment or in the one that the stream ends in.

    Alive are all old states, the output of the call before, and the new states of the layers before. An unfinished
    segment hands its compressed entries on and adds its own rows, keys and values.
    """

    def call(tokens: Expr, number: Expr, whole: bool) -> Expr:
        found = N * retrieved(number)
        old = row(_memory(number * S) + 2 * found)
        new = old if whole else row(Min(number * S, R) + 2 * found + 3 * tokens)
        fixed = L * old + row(Min(S, T)) + (L - 1) * new + Min(L - 1, 1) * row(tokens)
        return fixed + largest(row(tokens) + _piece(tokens, found + tokens), new + _feed(tokens))

    return largest(Min(WHOLE, 1) * call(S, WHOLE - 1, True), Min(REST, 1) * call(REST, WHOLE, False))


def _stacked(impl: str, count: Expr | int, queries: Expr, found: Expr) -> Expr:
    """``count`` segments in the batch of one attention: operands, output, and the mask twice or buffers.

    Kernels of our own read what was retrieved where it lies, and have no mask.
    """
    if impl == "triton":
        return 4 * row(count * queries) + 4 * B * h * count * queries
    operands = 3 * row(count * queries) + 2 * row(count * (found + queries)) + row(count * queries)
    if impl == "slabs":
        return operands + scratch(queries, found + queries, B * count)
    mask = queries * (found + queries)
    return operands + mask + tensor(queries, found + queries) + 4 * B * h * count * queries


def _last_run(compresses: bool) -> Expr:
    """Whole segments that read as many items as any will and choose among compressed ones, where these exist."""
    first = Piecewise((ceiling((R + N * RATE * EXTRA) / S), EXTRA > 0), (ceiling(PLAIN / ARRIVING), True))
    if compresses:
        first = largest(first, floor(R / S) + 1)
    return largest(WHOLE - first, 1)


def _stacked_forward(impl: str, compresses: bool) -> Expr:
    """Normed input, its copy as memory, entries, outputs so far, and the last and largest run of equal segments.

    Kernels of our own take so little that reading may be more: all items, the questions, what was found, and its keys
    and values, these with and without their weights.
    """
    count = _last_run(compresses)
    made = N * compressions((WHOLE - 1) * S) if compresses else Integer(0)
    found = N * retrieved(WHOLE - 1)
    run = _stacked(impl, count, S, found) + 2 * row(count * found) + SEVERAL * row(count * S)
    if impl == "triton":
        items = row(WHOLE * S) + row(made) if compresses else Integer(0)
        run = largest(run, items + row(count * S) + 4 * row(count * found))
    mixing = row(T) + row(WHOLE * S) + row(made) + row((WHOLE - count) * S) + run
    return largest(Min(WHOLE, 1) * mixing, 3 * row(T), _feed(T)) + Min(L - 1, 1) * row(T)


def _stacked_train(impl: str, compresses: bool) -> Expr:
    """As in the reference, but of the scores only a mask for each form of segment is kept."""
    segments = ceiling(T / S)
    found = N * retrieved_before(segments)
    statistics = 8 * B * T  # of a norm, in float32
    width = N * retrieved(WHOLE - 1) + S
    masks = tensor(S, S) + Min(WHOLE - 1, 1 + compresses) * tensor(S, width)
    run = S * _last_run(compresses)
    saved = 3 * row(T) + 2 * row(T + found) + 2 * row(found) + statistics
    if impl == "blocked":  # each run's output beside the joined one
        saved += row(T) + masks + 4 * B * h * T
    saved += SEVERAL * row(run)  # of a batch of several, stacking copies
    if compresses:
        made = N * compressions((segments - 1) * S)
        saved += 2 * row(made) + Piecewise((row(WHOLE * S), sympify(B) <= 1), (row(RATE * made), True))
    hidden = tensor(B, T, f)
    layer = saved + Piecewise((2 * row(T) + 2 * hidden + statistics, f > 0), (Integer(0), True))
    network = layer + row(T) + hidden + tensor(d, f)
    residual = Min(f, 1) * row(T)  # where a network's gradient passed it
    attention = saved + row(T) + residual + row(run) + 2 * row(run / S * width) + 2 * tensor(d, f)
    if impl == "slabs":
        attention += backward_scratch(S, width, B * run / S)
    attention += SEVERAL * row(run) + 2 * Min(REST, 1) * row(T)  # an unfinished segment's gradient is padded to all
    return (L - 1) * (layer + row(T)) + largest(attention, Piecewise((network, f > 0), (Integer(0), True)))


def _stacked_stream(impl: str, compresses: bool) -> Expr:
    """As in the reference, with old and new rows joined before the segment is computed."""

    def call(tokens: Expr, number: Expr, whole: bool) -> Expr:
        found, begin = N * retrieved(number), number * S
        old = row(_memory(begin) + 2 * found)
        new = old if whole else row(Min(begin, R) + 2 * found + 3 * tokens)
        fixed = L * old + row(Min(S, T)) + (L - 1) * new + Min(L - 1, 1) * row(tokens)
        joined = row(Min(begin, R) + tokens)
        if compresses and whole:
            joined += row(Min(C, N * compressions(begin)) + S / RATE)
        stages = [row(tokens) + joined + _stacked(impl, 1, tokens, found), new + _feed(tokens)]
        if whole:  # input, output, all items in one tensor, the question, then items with their keys and values
            items = joined if compresses else Integer(0)
            stages.append(2 * row(tokens) + joined + items + row(S) + 4 * row(N * retrieved(number + 1)))
        return fixed + largest(*stages)

    return largest(Min(WHOLE, 1) * call(S, WHOLE - 1, True), Min(REST, 1) * call(REST, WHOLE, False))


def _decode(compresses: bool) -> Expr:
    """One token. What it adds to is copied, compressed entries are handed on; or it is the last of its segment."""
    found, fill = N * retrieved(WHOLE), REST + 1
    keys, recent = found + fill, Min(WHOLE * S, R) + fill
    state = row(recent + 2 * keys)
    step = largest(row(1) + _piece(1, keys), state + _feed(1), state + 6 * row(1))
    inside = (L - 1) * state + Min(L - 1, 1) * row(1) + step
    return Piecewise((_turn(keys, recent, compresses), fill >= S), (inside, True))


def _turn(keys: Expr, recent: Expr, compresses: bool) -> Expr:
    """The token after which items are compressed and retrieved for the next segment."""
    begin = (WHOLE + 1) * S
    found = N * retrieved(WHOLE + 1)
    entries = Min(C, N * compressions(begin)) if compresses else Integer(0)
    joined = Min(N * compressions(begin), C + S / RATE) if compresses else Integer(0)
    items = Piecewise((entries + Min(begin, R), entries > 0), (Integer(0), True))
    reading = row(2 * keys + recent + joined + items + 4 * found)
    cutting = row(recent + joined + 2 * found + Min(begin, R) + entries)
    state = row(Min(begin, R) + entries + 2 * found)
    return (L - 1) * state + Min(L - 1, 1) * row(1) + largest(reading, cutting) + 3 * row(1)


def _train(compresses: bool) -> Expr:
    """Gradients at the two widest places of the last layer's backward pass: feed-forward network and attention."""
    segments = ceiling(T / S)
    found = N * retrieved_before(segments)
    pairs = S * (N * retrieved_before(WHOLE) + S * WHOLE) + REST * (N * retrieved(WHOLE) + REST)
    statistics = 8 * B * T  # of a norm, in float32
    saved = 3 * row(T) + 2 * row(T + found) + 2 * row(found) + (tensor(B, h) + 1) * pairs + statistics
    saved += SEVERAL * 2 * row(T)  # of a batch of several each projection keeps its pieces in a copy, not the whole
    if compresses:
        times = Max(0, segments - 1 - R / S)
        left = Max(0, (segments - 1) * S - R)
        kept = Piecewise((times * row(R + S), sympify(B) <= 1), (row(left), True))
        saved += kept + row(2 * left / RATE)
    hidden = tensor(B, T, f)
    layer = saved + Piecewise((2 * row(T) + 2 * hidden + statistics, f > 0), (Integer(0), True))
    width = N * retrieved(WHOLE - 1) + S
    network = layer + row(T) + hidden + tensor(d, f)
    residual = Min(f, 1) * row(T)  # where a network's gradient passed it
    attention = saved + row(T) + residual + 2 * tensor(B, h, S, width) + row(S) + 2 * tensor(d, f)
    attention += SEVERAL * 2 * (row(width) + row(S))  # keys, values, queries and their gradients turned back
    return (L - 1) * (layer + row(T)) + largest(attention, Piecewise((network, f > 0), (Integer(0), True)))
