"""Closed forms of ``window_blocks``: the pairs that blocks of queries multiply with the runs of keys they see."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, ceiling, floor

from ctxbench.cost.terms import triangle

BLOCK = Integer(64)  # queries a block


def run_pairs(first: Expr, queries: Expr, left: Expr, right: Expr, dilation: int, step: Expr) -> Expr:
    """Pairs of blocks against their runs, globals apart.

    Args:
        first: non-global keys ahead of the queries.
        queries: queries in the band, the last of the keys.
        left: steps of the band to earlier tokens.
        right: the same to later ones; 0 in the causal form.
        dilation: residue classes of positions.
        step: the same, as a symbol or a number.
    """
    total: Expr = Integer(0)
    for residue in range(dilation):
        before = floor((first + residue) / step)
        total += _class_pairs(before, ceiling(Max(queries - residue, 0) / step), left, right)
    return total


def _class_pairs(before: Expr, queries: Expr, left: Expr, right: Expr) -> Expr:
    whole = floor(queries / BLOCK)
    rest = queries - whole * BLOCK
    total = before + queries
    if right == 0:
        ends = BLOCK * (whole * before + BLOCK * triangle(whole))
    else:
        ends = BLOCK * (whole * total - _ramp(whole, rest - right))
    starts = BLOCK * _ramp(whole, before - left) + rest * Max(0, before + whole * BLOCK - left)
    return ends + rest * total - starts


def _ramp(count: Expr, start: Expr) -> Expr:
    """Sum over b < count of max(0, start + b BLOCK)."""
    skipped = Min(count, Max(0, ceiling(-start / BLOCK)))
    left = count - skipped
    return left * (start + skipped * BLOCK) + BLOCK * left * (left - 1) / 2
