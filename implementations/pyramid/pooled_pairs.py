"""Pairs of the layers in which cells attend to the level below, whose cells are ``pool`` times as many."""

from __future__ import annotations

from math import gcd

from sympy import Expr, Integer, Min, ceiling, floor

from ctxbench.cost.symbols import T
from ctxbench.cost.terms import triangle
from ctxbench.implementations.pyramid.memory import cells_at
from ctxbench.implementations.pyramid.params import PyramidParams

SLAB, SEGMENT = 128, 512  # cells a slab of the blocked impl, or a tile of flex; tokens a call in stream mode


def pairs_below(impl: str | None, level: int, mode: str, causal: bool, params: PyramidParams) -> Expr:
    """Pairs that an impl multiplies, or that the mathematics needs (None): cell c sees ``(c + 1) pool`` finer ones."""
    pool = params.pool
    cells, below = cells_at(level, T, causal), cells_at(level - 1, T, causal)
    if mode == "decode":
        after = cells_at(level, T + 1, True)
        return (after - cells) * after * pool
    if not causal:
        return cells * below
    if impl in (None, "triton"):
        return pool * triangle(cells)
    if mode == "stream":
        return _streamed(impl, level, pool)
    if impl == "flex":  # the last row of tiles ends at a whole tile of finer cells
        whole = floor(cells / SLAB)
        end = Min(SLAB * ceiling(pool * cells / SLAB), below)
        return pool * SLAB**2 * triangle(whole) + (cells - whole * SLAB) * end
    return pool * _slabs(cells) if impl == "blocked" else cells * below


def _slabs(cells: Expr | int) -> Expr:
    """Sum over slabs of rows times the last row's number: in units of ``pool`` pairs, counted from the call's first."""
    whole = floor(Integer(1) * cells / SLAB)
    return SLAB**2 * triangle(whole) + (cells - whole * SLAB) * cells


def _streamed(impl: str, level: int, pool: int) -> Expr:
    """Sum over calls of SEGMENT tokens. Every ``period`` calls are whole cells: each residue is a progression."""
    span = pool**level
    period, calls = span // gcd(SEGMENT, span), floor(T / SEGMENT)
    slope = period * SEGMENT // span

    def call(new: Expr | int, before: Expr | int, keys: Expr | int) -> Expr:
        return pool * (new * before + _slabs(new)) if impl == "blocked" else Integer(1) * new * keys

    before = floor(calls * SEGMENT / Integer(span))
    total = call(cells_at(level, T, True) - before, before, cells_at(level - 1, T, True))
    for residue in range(period):
        count = floor((calls - residue + period - 1) / Integer(period))
        first, after = residue * SEGMENT // span, (residue + 1) * SEGMENT // span
        keys = (residue + 1) * SEGMENT // (span // pool)
        total += count * call(after - first, first, keys)
        total += (after - first) * pool * slope * count * (count - 1) / 2
    return total
