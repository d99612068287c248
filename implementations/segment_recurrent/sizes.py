"""Sizes that several formulas share: segments, and the length of the memory that each of them finds."""

from __future__ import annotations

from sympy import Expr, Min, Mod, ceiling, floor, sympify

from ctxbench.cost.symbols import T, param

M = param("memory_len")
S = param("segment_len")
ADDED = Min(ceiling(M / 4), S)  # items a whole segment adds
WHOLE = floor(T / S)
REST = Mod(T, S)


def items_after(segments: Expr | int) -> Expr:
    """Items after that many whole segments."""
    return Min(M, sympify(segments) * ADDED)


def sum_of_items(segments: Expr, step: Expr = ADDED, power: int = 1) -> Expr:
    """Sum over the first segments of their memory's length, or its square: a ramp of ``step`` a segment, then M."""
    growing = Min(sympify(segments), floor(M / step) + 1)
    ramp = growing * (growing - 1) / 2
    if power == 2:
        ramp = ramp * (2 * growing - 1) / 3
    return step**power * ramp + (segments - growing) * M**power
