"""Closed forms of the pyramid: FLOPs, parameters and state. Derivation in README.md; ``memory.py`` has the peaks.

Level l has width ``d / 2^l``, FFN width ``f / 2^l``, ``cells_at(l)`` cells and ``layers_at(l)`` layers.
"""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Integer, Max, Min, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, h
from ctxbench.cost.terms import (
    attention,
    causal_pairs,
    ffn,
    linear,
    linear_parameters,
    projections,
    tensor,
)
from ctxbench.implementations._shared.forms import kernels, slab_pairs, trained
from ctxbench.implementations.pyramid.memory import cells_at, layer_parameters, layers_at, peak_bytes, width
from ctxbench.implementations.pyramid.params import PyramidParams
from ctxbench.implementations.pyramid.pooled_pairs import pairs_below
from ctxbench.method import ROPE


def cost(impl: str, mode: str, causal: bool, position: str, params: PyramidParams) -> Cost:
    """One impl in one mode. Rounding is exact, so the forms hold at every length, layer count and pool factor."""
    levels = params.levels
    algorithmic = _algorithmic(mode, causal, levels)
    flops = _as_written(levels) if impl == "as_written" else _executed(kernels(impl), mode, causal, levels, position)
    if params.pooled_queries:
        _pool_queries(algorithmic, None, mode, causal, params)
        _pool_queries(flops, kernels(impl), mode, causal, params)
    if mode == "train":
        algorithmic, flops = trained(algorithmic), trained(flops, impl)
        if params.pooled_queries and causal:
            for terms in (algorithmic, flops):
                terms["projections"] -= 2 * _unread(params.levels)
    rotates = position in ROPE
    unknown = (
        (position != "none" and (not rotates or impl in ("triton", "as_written") or mode == "train"))
        or impl == "flex"
        or (params.pooled_queries and (rotates or (kernels(impl), mode) != ("triton", "forward")))
    )
    peak = peak_bytes(impl if mode == "train" else kernels(impl), mode, causal, levels, rotates)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=_parameters(levels, sketch=impl == "as_written") + _tables(levels, position),
        state_bytes=_state(levels, params.pooled_queries) if causal and impl != "as_written" else Integer(0),
        peak_bytes=None if unknown else peak,
        depth=L,
    )


def _algorithmic(mode: str, causal: bool, levels: int) -> dict[str, Expr]:
    cells = [_new_cells(level, mode, causal) for level in range(levels)]
    pairs = [_visible_pairs(level, mode, causal) for level in range(levels)]
    return _terms([layers_at(level, levels) for level in range(levels)], cells, pairs, [Integer(0), *cells[1:]])


def _executed(impl: str, mode: str, causal: bool, levels: int, position: str) -> dict[str, Expr]:
    slabs = impl == "blocked" and causal and mode != "decode" and position in ("t5", "alibi")
    layers = [layers_at(level, levels) for level in range(levels)]
    cells = [_new_cells(level, mode, causal) for level in range(levels)]
    pairs = [
        _pairs_by_slabs(level, mode) if slabs else _executed_pairs(level, impl, mode, causal) for level in range(levels)
    ]
    read = [_read_rows(level, impl, mode, causal) for level in range(levels)]
    return _terms(layers, cells, pairs, read)


def _as_written(levels: int) -> dict[str, Expr]:
    """The sketch: layers that divide evenly, whole cells, at every cell attention among the B samples."""
    layers = [floor(L / Integer(levels))] * levels
    cells = [cells_at(level, T, True) for level in range(levels)]
    return _terms(layers, cells, [count * B for count in cells], [T] * levels)


def _terms(layers: list[Expr], cells: list[Expr], pairs: list[Expr], read: list[Expr]) -> dict[str, Expr]:
    """Forward FLOPs: halving the width makes a level's maps 4^l and its attention 2^l times cheaper."""
    terms: dict[str, Expr] = dict.fromkeys(("projections", "attention", "ffn", "pooling", "fusion"), Integer(0))
    for level in range(len(layers)):
        terms["projections"] += layers[level] * projections(cells[level]) / 4**level
        terms["attention"] += layers[level] * attention(pairs[level]) / 2**level
        terms["ffn"] += layers[level] * ffn(cells[level]) / 4**level
        terms["fusion"] += linear(B * read[level], width(level), d)
        if level:
            terms["pooling"] += linear(B * cells[level], width(level - 1), width(level))
    return terms


def _pool_queries(terms: dict[str, Expr], impl: str | None, mode: str, causal: bool, params: PyramidParams) -> None:
    """Change the first layer of every coarse level: keys and values of the cells below, which are projected unpooled.

    ``impl`` None: what the mathematics needs.
    """
    for level in range(1, params.levels):
        cells, below = (_new_cells(each, mode, causal) for each in (level, level - 1))
        if impl is None:
            plain, pooled = _visible_pairs(level, mode, causal), pairs_below(None, level, mode, causal, params)
        else:
            plain = _executed_pairs(level, impl, mode, causal)
            pooled = pairs_below(impl, level, mode, causal, params)
        terms["projections"] += 2 * linear(B * (below - cells), width(level), width(level))
        terms["attention"] += attention(pooled - plain) / 2**level
        terms["pooling"] += linear(B * (below - cells), width(level - 1), width(level))


def _unread(levels: int) -> Expr:
    """Keys and values of a level without a cell yet, causal: nothing reads them, so they have no backward pass."""
    total: Expr = Integer(0)
    for level in range(1, levels):
        cells, below = cells_at(level, T, True), cells_at(level - 1, T, True)
        total += (1 - Min(cells, 1)) * 2 * linear(B * below, width(level), width(level))
    return total


def _new_cells(level: int, mode: str, causal: bool) -> Expr:
    """Cells a call computes; ``stream`` counts all calls together."""
    if mode == "decode":
        return cells_at(level, T + 1, True) - cells_at(level, T, True)
    return cells_at(level, T, causal)


def _visible_pairs(level: int, mode: str, causal: bool) -> Expr:
    new = _new_cells(level, mode, causal)
    if mode == "decode":
        return new * cells_at(level, T + 1, True)
    return causal_pairs(new) if causal else new * new


def _executed_pairs(level: int, impl: str, mode: str, causal: bool) -> Expr:
    """Pairs that are multiplied: masked ones too, unless the fused kernel skips them."""
    if impl == "triton":
        return _visible_pairs(level, mode, causal)
    if impl == "flex" and causal:
        return slab_pairs(cells_at(level, T, True))
    if mode == "stream":
        first = cells_at(level, C, True)  # of the call without a cache, where the fused kernel may skip
        return _streamed_rectangles(level) - (first * (first - 1) / 2 if impl == "blocked" else 0)
    if mode == "decode" or impl in ("blocked", "flex"):
        return _visible_pairs(level, mode, causal)
    return cells_at(level, T, causal) ** 2


def _streamed_rectangles(level: int) -> Expr:
    """Pairs of each call's new cells with all cells so far, over calls of C tokens.

    With n_k cells after call k, ``n_k (n_k - n_(k-1)) = (n_k^2 - n_(k-1)^2 + (n_k - n_(k-1))^2) / 2`` telescopes.
    Whole calls add a = floor(C / s) cells or one more, and the latter as often as the total demands.
    """
    return (cells_at(level, T, True) ** 2 + _over_calls(level, lambda new: new**2)) / 2


def _pairs_by_slabs(level: int, mode: str) -> Expr:
    """As rectangles with what came before the call, and by slabs among the new cells."""
    cells = cells_at(level, T, True)
    if mode != "stream":
        return slab_pairs(cells)
    return (cells**2 - _over_calls(level, lambda new: new**2)) / 2 + _over_calls(level, slab_pairs)


def _over_calls(level: int, of: Callable[[Expr], Expr]) -> Expr:
    """Sum over all calls of a function of the new cells."""
    calls = floor(T / C)
    cells, streamed, a = (cells_at(level, tokens, True) for tokens in (T, calls * C, C))
    return calls * of(a) + (of(a + 1) - of(a)) * (streamed - calls * a) + of(cells - streamed)


def _read_rows(level: int, impl: str, mode: str, causal: bool) -> Expr:
    """Rows of a coarse level that the fusion projects: a row a token, or its cells and, causal, the one before."""
    if level == 0:
        return Integer(0)
    if impl == "reference":
        return Integer(1) if mode == "decode" else T
    calls = ceiling(T / C) if mode == "stream" else Integer(1)
    return _new_cells(level, mode, causal) + (calls if causal else 0)


def _parameters(levels: int, sketch: bool) -> Expr:
    total: Expr = Integer(0)
    for level in range(levels):
        layers = floor(L / Integer(levels)) if sketch else layers_at(level, levels)
        total += layers * layer_parameters(level)
        total += linear_parameters(width(level - 1), width(level)) if level else 0
    fused = [width(level) for level in range(0 if sketch else 1, levels)]
    return total + (linear_parameters(sum(fused), d) if fused else 0)


def _tables(levels: int, position: str) -> Expr:
    """T5's tables: level l has ``h / 2^l`` heads, and one at least."""
    heads = [Max(1, floor(h / Integer(2**level))) for level in range(levels)]
    return 32 * sum(heads, Integer(0)) if position == "t5" else Integer(0)


def _state(levels: int, pooled_queries: bool) -> Expr:
    """Keys and values of all cells; a level that is read keeps its last cell, one that is pooled its open sum.

    With pooled queries a level's first layer keeps the cells below, and sums are taken at the next level's width.
    """
    total: Expr = Integer(0)
    for level in range(levels):
        cells = cells_at(level, T, True)
        total += 2 * layers_at(level, levels) * tensor(B, cells, width(level))
        if level and pooled_queries:
            total += 2 * tensor(B, cells_at(level - 1, T, True) - cells, width(level))
        if level:
            total += tensor(B, width(level))
        if level < levels - 1:
            total += tensor(B, width(level + pooled_queries))
    return total
