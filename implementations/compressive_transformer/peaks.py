"""Closed forms of the allocator peak of the Compressive Transformer, stage by stage: the peak is the largest stage."""

from __future__ import annotations

from typing import NamedTuple

from sympy import Expr, Integer, Min, Piecewise, ceiling, floor

from ctxbench.cost.symbols import B, L, T, d, e, f, h
from ctxbench.cost.terms import largest, tensor
from ctxbench.implementations._shared.staircase import BLOCK, PANEL, SLAB
from ctxbench.implementations.compressive_transformer import sizes
from ctxbench.implementations.compressive_transformer.params import CompressiveTransformerParams
from ctxbench.implementations.compressive_transformer.sizes import LAST, ONE, RATE, M, S

STATISTICS = 8 * B  # bytes a token of a layer norm's mean and inverse deviation, kept in float32


class Call(NamedTuple):
    """Sizes that decide the peak of a call.

    Attributes:
        tokens: queries of the call; ``past``: rows of the state before it, ``known`` its entries.
        rows: queries of its longest segment; ``before``: rows and entries in front of that.
        made: entries that the call makes and sees.
        after: rows and entries of the state it leaves.
        regular: how many segments are whole and see all they can.
    """

    tokens: Expr
    past: Expr
    known: Expr
    rows: Expr
    before: Expr
    made: Expr
    after: Expr
    regular: Expr


def peak(impl: str, mode: str, params: CompressiveTransformerParams, weights: Expr) -> Expr | None:
    """Above parameters, input and incoming state; ``weights`` are those of a layer's compression."""
    zero = Integer(0)
    if mode in ("forward", "train"):
        rows, longest = Min(S, T), sizes.longest()
        made = sizes.evicted(LAST) / RATE if params.compressed_len else zero
        call = Call(T, zero, zero, rows, longest - rows, made, zero, sizes.full_segments())
        return _forward(impl, call) if mode == "forward" else _train(impl, call, params, weights)
    if mode == "stream":
        tokens = Min(S, T)
        before = sizes.longest() - tokens
        past = Min(before, M)
        after = Min(past + tokens, M) + Min(sizes.C, before - past + tokens / RATE)
        call = Call(tokens, past, before - past, tokens, before, zero, after, ONE)
        states = L * tensor(B, before, d)
        return states + tensor(B, tokens, d) + _continued(impl, call)
    past, known = sizes.state_rows(), sizes.state_entries()
    after = sizes.state_rows(T + 1) + (sizes.state_entries(T + 1) - known)
    return _continued(impl, Call(ONE, past, known, ONE, past + known, zero, after, ONE))


def _forward(impl: str, call: Call) -> Expr:
    """The layers before hold one row each time, the input of the layer."""
    row = tensor(B, call.tokens, d)
    return largest(_mixing(impl, call), 3 * row, _feed(call.tokens)) + Min(L - 1, 1) * row


def _continued(impl: str, call: Call) -> Expr:
    """New states of the layers before, and the widest place of the last layer."""
    state = tensor(B, call.after, d)
    carried = Min(L - 1, 1) * tensor(B, call.tokens, d)
    return (L - 1) * state + carried + largest(_mixing(impl, call), state + _feed(call.tokens))


def _mixing(impl: str, call: Call) -> Expr:
    if impl == "reference":
        return _loop(call)
    if impl == "triton":
        return _fused(call)
    if impl == "native":
        return _native(call)
    return Piecewise((_token(call), call.tokens <= 1), (_one_shot(call), True))


def _feed(tokens: Expr) -> Expr:
    """The feed-forward network holds its input and two hidden tensors."""
    return Piecewise((tensor(B, tokens, d) + 2 * tensor(B, tokens, f), f > 0), (Integer(0), True))


def _loop(call: Call) -> Expr:
    """Outputs so far, memories, and of one segment: context, q, k, v, r, four score tensors, the distances."""
    n, K = call.rows, call.before + call.rows
    batched = Min(B - 1, 1) * tensor(B, K, d)  # the product with the values copies them for a batch of several
    segment = 3 * tensor(B, K, d) + tensor(K, d) + tensor(B, n, d) + 4 * tensor(B, h, n, K)
    segment += 8 * n * K + largest(n * K, tensor(B, n, d) + batched)
    outputs = tensor(B, call.tokens, d)
    memories = tensor(B, call.before - call.past - call.known, d)
    return largest(outputs - tensor(B, n, d) + memories + segment, 2 * outputs + memories)


def _one_shot(call: Call) -> Expr:
    """Both queries, keys, values, output, entries with their keys and values, distances, and the widest block."""
    entries = call.known + call.made
    streams = 3 * tensor(B, call.tokens, d) + 2 * tensor(B, call.past + call.tokens, d)
    far = 2 * tensor(B, entries, d) + tensor(B, call.made, d)
    return streams + _joined(call) + far + tensor(call.before + call.rows, d) + _block(call, 2) + BLOCK**2


def _fused(call: Call) -> Expr:
    """Queries, keys, values, output, entries with their keys and values, distances; the log-sum-exp in float32."""
    streams = 2 * tensor(B, call.tokens, d) + 2 * tensor(B, call.past + call.tokens, d)
    far = 2 * tensor(B, call.known + call.made, d) + tensor(B, call.made, d)
    return streams + _joined(call) + far + tensor(call.before + call.rows, d) + 4 * B * h * call.tokens


def _native(call: Call) -> Expr:
    """Both queries, keys, values, output, entries with their keys and values, distances, and those packed."""
    streams = 3 * tensor(B, call.tokens, d) + 2 * tensor(B, call.past + call.tokens, d)
    far = 2 * tensor(B, call.known + call.made, d) + tensor(B, call.made, d)
    distances = call.before + call.rows
    return streams + _joined(call) + far + tensor(distances + PANEL * ceiling(distances / PANEL), d)


def _joined(call: Call) -> Expr:
    """Past and present rows in one tensor, where there is a past."""
    return Piecewise((tensor(B, call.past + call.tokens, d), call.past > 0), (Integer(0), True))


def _block(call: Call, scores: int) -> Expr:
    """So many score tensors of the first or last block of a segment, and its keys and queries in copies."""
    first = Min(BLOCK, call.rows)
    last = call.rows - BLOCK * (ceiling(call.rows / BLOCK) - 1)
    found = []
    for n, K in ((first, call.before + first), (last, call.before + call.rows)):
        group = largest(1, Min(call.regular, floor(SLAB / (B * h * n * K))))
        part = Min(B - 1, 1, call.tokens - n)  # of a batch of several, part of the rows is no view
        queries = Piecewise((2 * tensor(B, group, n, d), group > 1), (part * tensor(B, n, d), True))
        keys = Min(1, sizes.C + group - 1) * tensor(B, group, K, d)  # else a view
        found.append(scores * tensor(B, h, group * n, K) + keys + queries)
    return largest(*found)


def _token(call: Call) -> Expr:
    """One query against rows and entries as they are, and the table of distances, then three tensors of scores."""
    K = call.before + 1
    joined = tensor(B, call.past + 1, d) + Min(call.known, 1) * tensor(B, K, d)
    scores = tensor(B, h, K)
    return joined + 2 * tensor(B, h, d) + largest(tensor(K, d) + scores, 3 * scores + tensor(B, h, d))


def _train(impl: str, call: Call, params: CompressiveTransformerParams, weights: Expr) -> Expr:
    """Gradients at the two widest places of the last layer's backward pass: feed-forward network and attention."""
    row, hidden = tensor(B, call.tokens, d), tensor(B, call.tokens, f)
    saved, extra = {"reference": _loop_saved, "triton": _fused_saved}.get(impl, _one_shot_saved)(call)
    normed = row + STATISTICS * call.tokens  # the sum a norm was taken of, with its statistics
    mixed = saved + row + normed  # attention, the heads' output, the first norm
    whole = mixed + Piecewise((row + hidden + normed, f > 0), (Integer(0), True))
    below = (L - 1) * (whole + row)  # with the layer's output, the next one's input
    learned = L * e * weights if params.trained and params.auxiliary != "none" else Integer(0)
    gradients = tensor(d, d) + 2 * tensor(d, f)
    # Where the network's hidden rows get their gradient: output, gradient of the residual, two hidden tensors.
    network = mixed + row + hidden + 2 * row + 2 * hidden + tensor(d, f)
    attention = saved + 2 * row + extra + gradients  # output, gradient of the residual
    return below + learned + largest(attention, Piecewise((network, f > 0), (Integer(0), True)))


def _loop_saved(call: Call) -> tuple[Expr, Expr]:
    """Saved of every segment: context, k, v, r, both queries, scores by distance, probabilities, index, mask."""
    parts = sizes.sequence()
    keys, rectangles = sum(part.keys for part in parts), sum(part.rectangles for part in parts)
    n, K = call.rows, call.before + call.rows
    row = tensor(B, call.tokens, d)
    saved = 4 * tensor(B, keys, d) + 2 * row + (2 * tensor(B, h) + 9) * rectangles
    saved += Min(B - 1, 1) * row  # segments of a batch of several are copied for the projection of queries
    return saved, row + largest(3 * tensor(B, h, n, K) + tensor(B, K, d), 2 * row)


def _one_shot_saved(call: Call) -> tuple[Expr, Expr]:
    """Saved: queries, keys, values, entries, distances and their table. Extra: the gradients of all but the table."""
    row, far = tensor(B, call.tokens, d), tensor(B, call.made, d)
    distances = tensor(call.before + call.rows, d)
    saved = 4 * row + 3 * far + 2 * distances
    gradients = 7 * row + 2 * far + distances  # of the output, the queries, the streams twice, the distances
    copies = Min(B - 1, 1) * 4 * row  # a batch of several turns its streams back
    return saved, gradients + largest(_block(call, 3), 2 * row + copies)


def _fused_saved(call: Call) -> tuple[Expr, Expr]:
    """Saved: queries, keys, values, entries, distances, log-sum-exp. Extra: all gradients, keys' and values' twice."""
    row, far = tensor(B, call.tokens, d), tensor(B, call.made, d)
    distances = tensor(call.before + call.rows, d)
    saved = 3 * row + 3 * far + distances + 4 * B * h * call.tokens
    return saved, 9 * row + 2 * far + distances + 4 * tensor(d)
