"""Closed forms of the biased window: pairs that are seen and pairs that blocks of queries multiply. No torch."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, ceiling, floor, sympify

from ctxbench.cost.symbols import T, d, h
from ctxbench.cost.terms import window_pairs

BLOCK = 128  # queries a block of the blocked form


def window_parameters() -> Expr:
    """Four projections without bias, a scale a head."""
    return 4 * d * d + h


def ramp(count: Expr | int, step: Expr | int, most: Expr | int, start: Expr | int = 0) -> Expr:
    """Sum of ``min(start + t step, most)`` over t < count."""
    count, step, most, start = (sympify(value) for value in (count, step, most, start))
    rising = Min(count, Max(0, ceiling((most - start) / step)))
    return step * rising * (rising - 1) / 2 + rising * start + (count - rising) * most


def block_pairs(tokens: Expr | int, window: Expr | int, block: Expr | int) -> Expr:
    """Pairs of one call without a past: every block of queries against all keys its rows see."""
    tokens, block = sympify(tokens), sympify(block)
    whole = floor(tokens / block)
    rest = tokens - whole * block
    before = sympify(window) - 1
    pairs = block * (ramp(whole, block, before) + whole * block)
    return pairs + rest * (Min(whole * block, before) + rest)


def streamed_pairs(segment: int, window: Expr | int, block: int) -> Expr:
    """Pairs of calls of ``segment`` tokens each, the last one shorter; blocks begin anew in every call."""
    before, calls = sympify(window) - 1, floor(T / segment)
    pairs: Expr = Integer(0)
    for first in range(0, segment, block):
        rows = min(block, segment - first)
        pairs += rows * (ramp(calls, segment, before, first) + calls * rows)
    rest = T - calls * segment
    for first in range(0, segment, block):
        rows = Max(0, Min(block, rest - first))
        pairs += rows * (Min(calls * segment + first, before) + rows)
    return pairs


def seen_pairs(window: Expr | int) -> Expr:
    """Pairs of a whole sequence that the mathematics needs."""
    return window_pairs(T, window)
