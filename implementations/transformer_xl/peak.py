"""Closed forms of the allocator peak of Transformer-XL, stage by stage: the peak is the largest stage."""

from __future__ import annotations

from typing import NamedTuple

from sympy import Expr, Integer, Min, Piecewise, ceiling, floor

from ctxbench.cost.symbols import B, L, d, f, h
from ctxbench.cost.terms import largest, tensor
from ctxbench.implementations._shared.staircase import BLOCK, PANEL, SLAB

STATISTICS = 8 * B  # bytes a token of a layer norm's mean and inverse deviation, kept in float32


class Shape(NamedTuple):
    """Sizes that decide the peak of a call.

    Attributes:
        tokens: queries of the call; ``past``: rows that come before them.
        rows, memory: of its longest segment.
        keys, rectangles: rows and pairs of all its segments, in sum.
        regular: how many of them are whole and have a full memory.
        after: rows of the state that the call leaves.
    """

    tokens: Expr
    past: Expr
    rows: Expr
    memory: Expr
    keys: Expr
    rectangles: Expr
    regular: Expr
    after: Expr


def forward(impl: str, shape: Shape) -> Expr:
    """Above input and incoming state; the layers before hold one row each time, the input of the layer."""
    row = tensor(B, shape.tokens, d)
    mixing = {"reference": _loop, "blocked": _one_shot, "native": _native, "triton": _fused, "as_written": _sketch}[
        impl
    ](shape)
    return largest(mixing, 3 * row, _feed(shape.tokens)) + Min(L - 1, 1) * row


def stream(impl: str, shape: Shape) -> Expr:
    """A call with a full memory: ``tokens`` of the call, ``past`` rows of state; above the input alone."""
    keys = shape.past + shape.tokens
    # The sketch keeps a view of memory and input together; the others copy what the next call needs.
    before, after = (keys, keys) if impl == "as_written" else (shape.past, shape.after)
    last_output = tensor(B, shape.tokens, d)
    return L * tensor(B, before, d) + last_output + _continued(impl, shape, after)


def decode(impl: str, shape: Shape) -> Expr:
    """One token; above its input and the incoming state."""
    return _continued(impl, shape, shape.past + 1 if impl == "as_written" else shape.after)


def _continued(impl: str, shape: Shape, after: Expr) -> Expr:
    """A call that continues: new states of the layers before, and the widest place of the last layer."""
    state = tensor(B, after, d)
    mixing = {
        "reference": _loop,
        "blocked": _one_shot,
        "native": _native,
        "triton": _fused,
        "as_written": _sketch_joined,
    }[impl](shape)
    if impl == "blocked":
        mixing = Piecewise((_token(shape), shape.tokens <= 1), (mixing, True))
    carried = Min(L - 1, 1) * tensor(B, shape.tokens, d)
    return (L - 1) * state + carried + largest(mixing, state + _feed(shape.tokens))


def train(impl: str, shape: Shape) -> Expr:
    """Gradients at the two widest places of the last layer's backward pass: feed-forward network and attention."""
    row, hidden = tensor(B, shape.tokens, d), tensor(B, shape.tokens, f)
    saved, extra = {
        "reference": _loop_train,
        "blocked": _one_shot_train,
        "native": _one_shot_train,
        "triton": _fused_train,
        "as_written": _sketch_train,
    }[impl](shape)
    normed = row + STATISTICS * shape.tokens  # the sum a norm was taken of, with its statistics
    mixed = saved + row + normed  # attention, the heads' output, the first norm
    whole = mixed + Piecewise((row + hidden + normed, f > 0), (Integer(0), True))
    below = (L - 1) * (whole + row)  # with the layer's output, the next one's input
    weights = tensor(d, d) + 2 * tensor(d, f)
    # Where the network's hidden rows get their gradient: output, gradient of the residual, two hidden tensors.
    network = mixed + row + hidden + 2 * row + 2 * hidden + tensor(d, f)
    attention = saved + 2 * row + extra + weights  # output, gradient of the residual
    return below + largest(attention, Piecewise((network, f > 0), (Integer(0), True)))


def _feed(tokens: Expr) -> Expr:
    """The feed-forward network holds its input and two hidden tensors."""
    return Piecewise((tensor(B, tokens, d) + 2 * tensor(B, tokens, f), f > 0), (Integer(0), True))


def _one_shot(shape: Shape) -> Expr:
    """Both queries, keys, values, output, distances, and the widest block."""
    streams = 3 * tensor(B, shape.tokens, d) + 2 * tensor(B, shape.past + shape.tokens, d)
    return streams + _joined(shape) + tensor(shape.memory + shape.rows, d) + _block(shape, 2) + BLOCK**2


def _fused(shape: Shape) -> Expr:
    """Queries, keys, values, output and distances; a log-sum-exp a row and head in float32."""
    streams = 2 * tensor(B, shape.tokens, d) + 2 * tensor(B, shape.past + shape.tokens, d)
    return streams + _joined(shape) + tensor(shape.memory + shape.rows, d) + 4 * B * h * shape.tokens


def _native(shape: Shape) -> Expr:
    """Both queries, keys, values, output, distances, and those packed."""
    streams = 3 * tensor(B, shape.tokens, d) + 2 * tensor(B, shape.past + shape.tokens, d)
    distances = shape.memory + shape.rows
    return streams + _joined(shape) + tensor(distances + PANEL * ceiling(distances / PANEL), d)


def _joined(shape: Shape) -> Expr:
    """Past and present rows in one tensor, where there is a past."""
    return Piecewise((tensor(B, shape.past + shape.tokens, d), shape.past > 0), (Integer(0), True))


def _block(shape: Shape, scores: int) -> Expr:
    """So many score tensors of the first or last block of a segment; copies of keys and queries where G > 1."""
    first = Min(BLOCK, shape.rows)
    last = shape.rows - BLOCK * (ceiling(shape.rows / BLOCK) - 1)
    sizes = []
    for n, K in ((first, shape.memory + first), (last, shape.memory + shape.rows)):
        group = largest(1, Min(shape.regular, floor(SLAB / (B * h * n * K))))
        part = Min(B - 1, 1, shape.tokens - n)  # of a batch of several, part of the rows is no view
        copies = Piecewise((tensor(B, group, K + 2 * n, d), group > 1), (part * tensor(B, n, d), True))
        sizes.append(scores * tensor(B, h, group * n, K) + copies)
    return largest(*sizes)


def _loop(shape: Shape) -> Expr:
    """The stream, the outputs so far, and of one segment: context, q, k, v, r, four score tensors, the distances."""
    n, K = shape.rows, shape.memory + shape.rows
    batched = Min(B - 1, 1) * tensor(B, K, d)  # the product with the values copies them for a batch of several
    segment = 3 * tensor(B, K, d) + tensor(K, d) + tensor(B, n, d) + 4 * tensor(B, h, n, K)
    segment += 9 * n * K + largest(n * K, tensor(B, n, d) + batched)
    stream = tensor(B, shape.past + shape.tokens, d)
    outputs = tensor(B, shape.tokens, d)
    return largest(stream + outputs - tensor(B, n, d) + segment, stream + 2 * outputs)


def _sketch(shape: Shape) -> Expr:
    return 3 * tensor(B, shape.keys, d) + 2 * tensor(B, h, shape.rectangles)


def _sketch_joined(shape: Shape) -> Expr:
    """Queries; context, keys and values of memory and input; scores twice, or a copy of the keys and them once."""
    n, K = shape.tokens, shape.past + shape.tokens
    scores = tensor(B, h, n, K)
    return 3 * tensor(B, K, d) + tensor(B, n, d) + scores + largest(scores, Min(B - 1, 1) * tensor(B, K, d))


def _token(shape: Shape) -> Expr:
    """One query against the rows as they are: rows and table of distances, then three tensors of scores."""
    K = shape.past + 1
    return (
        tensor(B, K, d)
        + 2 * tensor(B, h, d)
        + largest(tensor(K, d) + tensor(B, h, K), 3 * tensor(B, h, K) + tensor(B, h, d))
    )


def _one_shot_train(shape: Shape) -> tuple[Expr, Expr]:
    """Saved: both queries, keys, values, distances and their table. Extra: the gradients of all but the table."""
    row, stream = tensor(B, shape.tokens, d), tensor(B, shape.past + shape.tokens, d)
    distances = tensor(shape.memory + shape.rows, d)
    saved = 2 * row + 2 * stream + _joined(shape) + 2 * distances
    gradients = 3 * row + 4 * stream + distances  # of the output, the queries, the streams twice, the distances
    copies = Min(B - 1, 1) * 4 * stream  # a batch of several turns its streams back
    return saved, gradients + largest(_block(shape, 3), 2 * stream + copies)


def _fused_train(shape: Shape) -> tuple[Expr, Expr]:
    """Saved: queries, keys, values, distances, log-sum-exp. Extra: the gradients of all, of keys and values twice."""
    row, stream = tensor(B, shape.tokens, d), tensor(B, shape.past + shape.tokens, d)
    distances = tensor(shape.memory + shape.rows, d)
    saved = row + 2 * stream + _joined(shape) + distances + 4 * B * h * shape.tokens
    return saved, 3 * row + 6 * stream + distances + 4 * tensor(d)  # a product of each kind too


def _loop_train(shape: Shape) -> tuple[Expr, Expr]:
    """Saved of every segment: context, k, v, r, both queries, scores by distance, probabilities, index, mask."""
    n, K = shape.rows, shape.memory + shape.rows
    row = tensor(B, shape.tokens, d)
    saved = 4 * tensor(B, shape.keys, d) + 2 * row + (2 * tensor(B, h) + 9) * shape.rectangles
    saved += Min(B - 1, 1) * row  # segments of a batch of several are copied for the projection of queries
    return saved, row + largest(3 * tensor(B, h, n, K) + tensor(B, K, d), 2 * row)


def _sketch_train(shape: Shape) -> tuple[Expr, Expr]:
    """Saved: q, k, v and probabilities. Extra: the gradients of values (for the saved ones), probabilities, scores."""
    scores = tensor(B, h, shape.rectangles)
    return 3 * tensor(B, shape.tokens, d) + scores, 2 * scores


MIXING = {"reference": _loop, "blocked": _one_shot, "native": _native, "triton": _fused}
