"""Closed forms of the pyramid. Derivation in README.md.

Level l has ``n_l`` cells of width ``d / 2^l`` and ``m_l`` layers; all sums run over levels.
"""

from __future__ import annotations

from sympy import Add, Expr, Integer, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, e, f, param
from ctxbench.cost.terms import (
    FUSED_BACKWARD, attention, causal_pairs, ffn, linear, linear_parameters, projections, tensor, when_ffn,
)  # fmt: skip
from ctxbench.implementations.pyramid.params import PyramidParams

pool = param("pool")


def cost(impl: str, mode: str, causal: bool, params: PyramidParams) -> Cost:
    """One impl in one mode. Rounding is exact, so the forms hold at every length, layer count and pool factor."""
    levels = range(params.levels)
    cells = [_new_cells(level, mode, causal) for level in levels]
    visible = [_visible_pairs(level, mode, causal) for level in levels]
    executed = [_executed_pairs(level, mode, causal, impl) for level in levels]
    read = [_read_rows(level, impl, mode, causal) for level in levels]
    algorithmic = _terms(cells, visible, cells)
    flops = _as_written(params.levels) if impl == "as_written" else _terms(cells, executed, read)
    if mode == "train":
        core = FUSED_BACKWARD if impl == "blocked" else 2
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
        flops = {term: forward * (1 + core if term == "attention" else 3) for term, forward in flops.items()}
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=_parameters(params.levels, impl),
        state_bytes=_state(params.levels) if causal and impl != "as_written" else Integer(0),
    )


def layers_at(level: int, levels: int) -> Expr:
    """Layers of a level: an even share, the remainder to the finest levels."""
    return floor((L + levels - 1 - level) / Integer(levels))


def cells_at(level: int, tokens: Expr, causal: bool) -> Expr:
    """Cells of a level: complete ones where causal, else the last may hold fewer cells of the level below."""
    if level == 0:
        return tokens
    return floor(tokens / pool**level) if causal else ceiling(tokens / pool**level)


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


def _executed_pairs(level: int, mode: str, causal: bool, impl: str) -> Expr:
    """Pairs that are multiplied: masked ones too, unless the fused kernel skips them."""
    cells = cells_at(level, T, causal)
    if mode == "stream":
        first = cells_at(level, C, True)  # of the call without a cache, where the fused kernel may skip
        return _streamed_rectangles(level) - (first * (first - 1) / 2 if impl == "blocked" else 0)
    if mode == "decode" or impl == "blocked":
        return _visible_pairs(level, mode, causal)
    return cells * cells


def _streamed_rectangles(level: int) -> Expr:
    """Pairs of each call's new cells with all cells so far, over calls of C tokens.

    With n_k cells after call k, ``n_k (n_k - n_(k-1)) = (n_k^2 - n_(k-1)^2 + (n_k - n_(k-1))^2) / 2`` telescopes.
    Whole calls add a = floor(C / s) cells or one more, and the latter as often as the total demands.
    """
    calls = floor(T / C)
    cells, streamed, a = (cells_at(level, tokens, True) for tokens in (T, calls * C, C))
    squares = calls * a**2 + (2 * a + 1) * (streamed - calls * a) + (cells - streamed) ** 2
    return (cells**2 + squares) / 2


def _read_rows(level: int, impl: str, mode: str, causal: bool) -> Expr:
    """Rows of a coarse level that the fusion projects: a row a token, or its cells and, causal, the one before."""
    if level == 0:
        return Integer(0)
    if impl == "reference":
        return Integer(1) if mode == "decode" else T
    calls = ceiling(T / C) if mode == "stream" else Integer(1)
    return _new_cells(level, mode, causal) + (calls if causal else 0)


def _terms(cells: list[Expr], pairs: list[Expr], read: list[Expr]) -> dict[str, Expr]:
    """Forward FLOPs: a level is ``2^l`` times narrower, so its maps cost ``4^l`` and its attention ``2^l`` less."""
    levels = len(cells)
    share = [layers_at(level, levels) for level in range(levels)]
    return {
        "projections": Add(*(share[l] * projections(cells[l]) / 4**l for l in range(levels))),
        "attention": Add(*(share[l] * attention(pairs[l]) / 2**l for l in range(levels))),
        "ffn": Add(*(share[l] * ffn(cells[l]) / 4**l for l in range(levels))),
        "pooling": Add(*(linear(B * cells[l], 2 * width(l), width(l)) for l in range(1, levels))),
        "fusion": Add(*(linear(B * read[l], width(l), d) for l in range(1, levels))),
    }


def _as_written(levels: int) -> dict[str, Expr]:
    """Forward FLOPs of the sketch: layers that divide evenly, whole cells, attention of B samples at every cell."""
    share = floor(L / Integer(levels))
    cells = [cells_at(level, T, True) for level in range(levels)]
    return {
        "projections": Add(*(share * projections(cells[l]) / 4**l for l in range(levels))),
        "attention": Add(*(share * attention(cells[l] * B) / 2**l for l in range(levels))),
        "ffn": Add(*(share * ffn(cells[l]) / 4**l for l in range(levels))),
        "pooling": Add(*(linear(B * cells[l], 2 * width(l), width(l)) for l in range(1, levels))),
        "fusion": Add(*(linear(B * T, width(l), d) for l in range(levels))),
    }


def width(level: int) -> Expr:
    """Width of a level."""
    return d / 2**level


def _parameters(levels: int, impl: str) -> Expr:
    sketch = impl == "as_written"
    total: Expr = Integer(0)
    for level in range(levels):
        w, hidden = width(level), f / 2**level
        layer = 4 * linear_parameters(w, w) + 2 * w
        layer += when_ffn(2 * w + linear_parameters(w, hidden) + linear_parameters(hidden, w))
        total += (floor(L / Integer(levels)) if sketch else layers_at(level, levels)) * layer
        total += linear_parameters(2 * w, w) if level else 0
    fused = Add(*(width(level) for level in range(0 if sketch else 1, levels)))
    return total + (linear_parameters(fused, d) if fused != 0 else 0)


def _state(levels: int) -> Expr:
    """Keys and values of all cells; a level read from keeps its last cell, one that is pooled the open cell's sum."""
    caches = [2 * layers_at(l, levels) * tensor(B, cells_at(l, T, True), width(l)) for l in range(levels)]
    rows = [tensor(B, width(l)) for l in range(1, levels)] + [tensor(B, width(l)) for l in range(levels - 1)]
    return Add(*caches, *rows)
