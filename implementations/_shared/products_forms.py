"""Closed forms of ``products``: pairs that its slabs multiply, and bytes of the buffers that it uses again."""

from __future__ import annotations

from sympy import Expr, Max, Min, floor, sympify

from ctxbench.cost.symbols import B, d, e, h
from ctxbench.implementations._shared.forms import slab_pairs
from ctxbench.implementations._shared.staircase import BLOCK, SLAB


def product_pairs(queries: Expr | int, keys: Expr | int) -> Expr:
    """Pairs of causal attention whose last query sees every key: each slab ends at its last query."""
    queries = sympify(queries)
    return slab_pairs(queries) + queries * (keys - queries)


def scratch(queries: Expr | int, keys: Expr | int, rows: Expr | int = B, causal: bool = True) -> Expr:
    """Bytes beside the operands and the output: keys, values, queries and scores of a part, and a mask."""
    r, g = Min(sympify(queries), BLOCK), _items(queries, keys, rows)
    return e * g * (2 * keys * d / h + r * d / h + r * keys) + (e * r**2 if causal else 0)


def backward_scratch(queries: Expr | int, keys: Expr | int, rows: Expr | int = B, causal: bool = True) -> Expr:
    """The same in the backward pass: one product of keys, gradients of queries and scores, and wide sums."""
    r, g = Min(sympify(queries), BLOCK), _items(queries, keys, rows)
    more = e * g * (keys * d / h + r * d / h + r * keys) + Max(e, 4) * g * 2 * keys * d / h
    return scratch(queries, keys, rows, causal) + more


def _items(queries: Expr | int, keys: Expr | int, rows: Expr | int) -> Expr:
    """Heads of rows of the batch that are computed together."""
    r = Min(sympify(queries), BLOCK)
    return items(Max(1, floor(SLAB / Max(1, r * keys))), rows)


def items(fit: Expr, rows: Expr | int = B) -> Expr:
    """Of the largest of ``products.parts``."""
    return Min(rows, Max(1, floor(fit / h))) * Min(h, fit)
