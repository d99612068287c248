"""Closed forms of ``products``: pairs that its slabs multiply, and bytes of the buffers that it uses again."""

from __future__ import annotations

from sympy import Expr, Max, Min, ceiling, floor, sympify

from ctxbench.cost.symbols import B, d, e, h
from ctxbench.implementations._shared.products_table import BLOCK, REST, SCORES


def own_pairs(queries: Expr | int) -> Expr:
    """Pairs of n queries and as many keys, causal: each slab ends at its last query."""
    queries = sympify(queries)
    before = _slabs(queries) - 1  # the last slab
    return BLOCK**2 * before * (before + 1) / 2 + (queries - before * BLOCK) * queries


def product_pairs(queries: Expr | int, keys: Expr | int) -> Expr:
    """The same where the last query sees every key, and keys come before the first one."""
    queries = sympify(queries)
    return own_pairs(queries) + queries * (keys - queries)


def scratch(
    queries: Expr | int, keys: Expr | int, rows: Expr | int = B, causal: bool = True, masked: bool = True
) -> Expr:
    """Bytes beside the operands and the output: keys, values, queries and scores of a part, and a mask.

    ``masked``: no bias hides later keys.
    """
    r = _longest(queries, keys, causal)
    g = _items(r, keys, rows)
    return e * g * (2 * keys * d / h + r * d / h + r * keys) + (mask(queries) if causal and masked else 0)


def mask(queries: Expr | int) -> Expr:
    """Bytes of what hides later keys."""
    return e * _longest(queries, 0, causal=True) ** 2


def backward_scratch(
    queries: Expr | int, keys: Expr | int, rows: Expr | int = B, causal: bool = True, masked: bool = True
) -> Expr:
    """The same in the backward pass: one product of keys, gradients of queries and scores, and wide sums."""
    r = _longest(queries, keys, causal)
    g = _items(r, keys, rows)
    more = e * g * (keys * d / h + r * d / h + r * keys) + Max(e, 4) * g * 2 * keys * d / h
    return scratch(queries, keys, rows, causal, masked) + more


def _slabs(queries: Expr) -> Expr:
    """Causal slabs."""
    return Max(1, ceiling((queries - REST) / BLOCK))


def _longest(queries: Expr | int, keys: Expr | int, causal: bool) -> Expr:
    """Queries of the longest slab."""
    queries = sympify(queries)
    if causal:
        return Max(Min(queries, BLOCK), queries - (_slabs(queries) - 1) * BLOCK)
    most = Max(BLOCK, floor(SCORES / Max(1, h * keys)))
    return ceiling(queries / Max(1, ceiling(queries / most)))


def _items(longest: Expr, keys: Expr | int, rows: Expr | int) -> Expr:
    """Heads of rows of the batch that are computed together."""
    return items(Max(1, floor(SCORES / Max(1, longest * keys))), rows)


def items(fit: Expr, rows: Expr | int = B) -> Expr:
    """Of the largest of ``products.parts``."""
    return Min(rows, Max(1, floor(fit / h))) * Min(h, fit)
