"""Sizes of the levels and allocator peaks of the pyramid, in closed form. Derivation in README.md."""

from __future__ import annotations

from sympy import Add, Expr, Integer, Max, Min, ceiling, floor

from ctxbench.cost.symbols import B, C, L, T, d, e, f, h, param
from ctxbench.cost.terms import linear_parameters, tensor, when_ffn

pool = param("pool")
FUSED = ("blocked", "native", "triton")  # impls that keep no scores, but a number a query


def width(level: int) -> Expr:
    """Width of a level."""
    return d / Integer(2) ** level


def heads(level: int) -> Expr:
    """Heads of a level: halved with the width, at least one."""
    return Max(1, floor(h / Integer(2) ** level)) if level else h


def layers_at(level: int, levels: int) -> Expr:
    """Layers of a level: an even share, the remainder to the finest levels."""
    return floor((L + levels - 1 - level) / Integer(levels))


def cells_at(level: int, tokens: Expr, causal: bool) -> Expr:
    """Cells of a level: complete ones where causal, else the last may hold fewer cells of the level below."""
    if level == 0:
        return tokens
    return floor(tokens / pool**level) if causal else ceiling(tokens / pool**level)


def layer_parameters(level: int) -> Expr:
    """Attention with biases, two norms, FFN."""
    w, hidden = width(level), f / Integer(2) ** level
    feed = when_ffn(2 * w + linear_parameters(w, hidden) + linear_parameters(hidden, w))
    return 4 * linear_parameters(w, w) + 2 * w + feed


def peak_bytes(impl: str, mode: str, causal: bool, levels: int, rotates: bool = False) -> Expr:
    """Most bytes alive at once above parameters, input and incoming state.

    Every form is the largest over the few moments that can be the worst: within a layer, at the end of a level, at the
    fusion, and in the backward pass of the finest level's last layer.
    """
    if impl == "as_written":
        return _sketch_train(levels) if mode == "train" else _sketch_forward(levels)
    if mode == "train":
        return _train(impl, causal, levels)
    if mode == "decode":
        return _continue(impl, T, T + 1, levels, rotates)
    if mode == "stream":  # the last call, or the one before it, which may be longer
        last = C * (ceiling(T / C) - 1)
        before = Max(0, last - C)
        calls = (last, T), (before, last)
        return _largest(*(_carried(call[0], levels) + _continue(impl, *call, levels, rotates) for call in calls))
    turned = [_rotating(0, T)] * rotates
    return _any(layers_at(0, levels) - 1) * _row(0, T) + _largest(_mixing(impl, causal), _feed(0, T), *turned)


def _rotating(level: int, cells: Expr) -> Expr:
    """As ``forms.rotating``, in a level: the norm, q, k, v, new queries, two rows of products, cosines and sines."""
    wide = Max(e, 4) * cells * width(level)
    return 5 * _row(level, cells) + 2 * B * wide + wide / heads(level)


def _row(level: int, cells: Expr) -> Expr:
    return tensor(B, cells, width(level))


def _hidden(level: int, cells: Expr) -> Expr:
    return tensor(B, cells, f / Integer(2) ** level)


def _feed(level: int, cells: Expr) -> Expr:
    """Residual, its norm, and the hidden layer before and after its activation."""
    return when_ffn(2 * _row(level, cells) + 2 * _hidden(level, cells))


def _mixing(impl: str, causal: bool) -> Expr:
    """Norm, q, k, v of the finest level; heads' output and its projection, or two score tensors with masks."""
    if impl in FUSED:
        return 6 * _row(0, T)
    return (4 if causal else 5) * _row(0, T) + 2 * tensor(B, h, T, T) + (2 * T * T if causal else 0)


def _caches(tokens: Expr, levels: int) -> Expr:
    """Keys and values of all levels after ``tokens`` tokens."""
    return Add(*(2 * layers_at(level, levels) * _row(level, cells_at(level, tokens, True)) for level in range(levels)))


def _single(level: int, levels: int) -> Expr:
    """Rows of a level's state: the last cell where it is read, the open sum where it is pooled."""
    return (int(level > 0) + int(level < levels - 1)) * _row(level, Integer(1))


def _carried(tokens: Expr, levels: int) -> Expr:
    """What a call of a stream finds there: the state after ``tokens`` tokens, and the output of the call before."""
    single = Add(*(_single(level, levels) for level in range(levels)))
    return _caches(tokens, levels) + single + tensor(B, Min(tokens, C), d)


def _continue(impl: str, before: Expr, after: Expr, levels: int, rotates: bool) -> Expr:
    """A call that takes the context from ``before`` to ``after`` tokens: the state is written anew level by level.

    At work are a level's last layer, beside what entered it and what the levels below have found, or the last sum.
    """
    written: Expr = Integer(0)
    found: Expr = Integer(0)
    moments = []
    for level in range(levels):
        cells = cells_at(level, after, True)
        new = cells - cells_at(level, before, True)
        row, pairs = _row(level, new), new * cells
        written += 2 * _any(new) * layers_at(level, levels) * _row(level, cells)
        if impl == "reference":
            inner = 2 * row + 2 * e * B * heads(level) * pairs + 2 * pairs
        elif impl == "triton":  # no mask, but a number a query
            inner = 3 * row + 4 * B * heads(level) * new
        else:  # one query needs no mask; else it is kept as booleans and as numbers
            inner = 3 * row + _any(new - 1) * (1 + e) * pairs
        entered = (_any(layers_at(level, levels) - 1) + int(level > 0)) * row
        moments.append(written + found + entered + _largest(inner, 4 * row, _feed(level, new)))
        if rotates:  # before this layer's cache is written
            unwritten = written - 2 * _any(new) * _row(level, cells)
            moments.append(unwritten + found + entered + _rotating(level, new))
        found += row if level == 0 else _any(new) * _row(level, new + 1)
        found += _any(new) * _single(level, levels)
    if levels > 1:
        rows = cells_at(1, after, True) - cells_at(1, before, True) + 1
        moments.append(written + found + tensor(B, rows, d) + _row(0, after - before))
    return _largest(*moments)


def _saved(impl: str, causal: bool, level: int, levels: int) -> Expr:
    """What the backward pass of a level needs: per layer norms, q, k, v, output, sums, hidden layers, probabilities."""
    cells = cells_at(level, T, causal)
    row, statistics = _row(level, cells), 2 * e * B * cells
    if impl in FUSED:
        core = 4 * B * heads(level) * cells
    else:
        core = tensor(B, heads(level), cells, cells) + (cells**2 if causal else 0)
    layer = 6 * row + statistics + core + when_ffn(2 * row + 2 * _hidden(level, cells) + statistics)
    entry: Expr = Integer(0)
    if level:  # the pooled cells, twice as wide, and their projection; what is read has zeros in front
        entry = 3 * row + (_row(level, Integer(1)) if causal else 0)
    return layers_at(level, levels) * layer + entry


def _train(impl: str, causal: bool, levels: int) -> Expr:
    """End of the forward pass, or the backward pass of the finest level's last layer."""
    row, hidden = _row(0, T), _hidden(0, T)
    saved = [_saved(impl, causal, level, levels) for level in range(levels)]
    gradients = e * Add(*(layers_at(level, levels) * layer_parameters(level) for level in range(1, levels)))
    gradients += e * Add(*(linear_parameters(width(level - 1), width(level)) for level in range(1, levels)))
    fused = Add(*(width(level) for level in range(1, levels)))
    gradients += e * (fused * d + (d if levels > 1 else 0))
    if impl in FUSED:
        outer = e * (d * d + d) + when_ffn(e * (2 * d * f + f + 3 * d))  # gradients of what is above the attention
        inner = _largest(when_ffn(hidden + e * (d * f + d)), 4 * row + outer - when_ffn(2 * row + 2 * hidden))
        inner += row if levels > 1 else 0
        merged = tensor(B, cells_at(1, T, causal) + (1 if causal else 0), d)
        fusion = (1 if impl == "triton" else 1 + pool) * merged + row  # copies of rows, unless they are added at once
    else:
        inner = 2 * tensor(B, h, T, T) - when_ffn(2 * row + 2 * hidden)
        fusion = 2 * tensor(B, T, fused) + 2 * row
    backward = saved[0] + gradients + inner
    return _largest(backward, Add(*saved) + fusion) if levels > 1 else backward


def _sketch_forward(levels: int) -> Expr:
    """Finest level: q, k, v and their copy, or the FFN with the attention's output and weights still held."""
    row = _row(0, T)
    feed = when_ffn(2 * row + 2 * _hidden(0, T) + tensor(B, B, T))
    return _any(floor(L / Integer(levels)) - 1) * row + _largest(6 * row, feed)


def _sketch_train(levels: int) -> Expr:
    """Fusion's backward pass: everything saved, the concatenation, its gradient, the output. Or the finest level's."""
    saved = []
    for level in range(levels):
        cells = cells_at(level, T, True)
        row, statistics = _row(level, cells), 2 * e * B * cells
        layer = 7 * row + statistics + tensor(B, B, h, cells)
        layer += when_ffn(2 * row + 2 * _hidden(level, cells) + statistics)
        saved.append(floor(L / Integer(levels)) * layer + (3 * row if level else 0))
    unsaved = _row(levels - 1, cells_at(levels - 1, T, True))  # the coarsest output: only its stretched copy is kept
    fused = Add(*(width(level) for level in range(levels)))
    fusion = Add(*saved) - unsaved + _row(0, T) + 2 * tensor(B, T, fused) + e * d * fused
    row, hidden = _row(0, T), _hidden(0, T)
    inner = _largest(when_ffn(hidden + e * d * f), 5 * row - when_ffn(2 * row + 2 * hidden))
    return _largest(fusion, saved[0] + inner)


def _largest(*moments: Expr) -> Expr:
    """``Max`` as it stands: to compare such forms symbolically takes seconds and decides nothing."""
    return Max(*moments, evaluate=False)


def _any(count: Expr) -> Expr:
    """1 where there is at least one, 0 where there is none."""
    return Min(count, 1, evaluate=False)
