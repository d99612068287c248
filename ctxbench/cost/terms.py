"""Parts that many formulas share. FLOPs: 1 multiply-add = 2; only matmul-like work counts; pairs are exact.

Backward: a linear map costs twice its forward; an attention core whose probabilities were saved costs twice, a fused
core that recomputes them 2.5 times (five products instead of two).
"""

from __future__ import annotations

from sympy import Expr, Max, Min, Piecewise, Rational, sympify

from ctxbench.cost.symbols import B, d, e, f

FUSED_BACKWARD = Rational(5, 2)


def triangle(n: Expr | int) -> Expr:
    """1 + 2 + ... + n: the pairs of n queries that each see themselves and all before."""
    n = sympify(n)
    return n * (n + 1) / 2


def causal_pairs(queries: Expr | int, offset: Expr | int = 0) -> Expr:
    """Pairs of causal attention in which every query also sees ``offset`` earlier keys."""
    return triangle(queries) + sympify(queries) * offset


def window_pairs(tokens: Expr | int, window: Expr | int) -> Expr:
    """Pairs of causal attention over the last ``window`` keys, the query included: a ramp, then flat."""
    w = Min(tokens, window)
    return sympify(tokens) * w - w * (w - 1) / 2


def band_pairs(tokens: Expr | int, left: Expr | int, right: Expr | int) -> Expr:
    """Pairs of a two-sided band: query i sees keys i - left .. i + right."""
    n = sympify(tokens)
    a, c = Min(left, n - 1), Min(right, n - 1)
    return n * (a + c + 1) - a * (a + 1) / 2 - c * (c + 1) / 2


def linear(tokens: Expr | int, into: Expr | int, out: Expr | int) -> Expr:
    """FLOPs of a linear map of ``tokens`` rows."""
    return 2 * sympify(tokens) * into * out


def attention(pairs: Expr | int) -> Expr:
    """FLOPs of scores and values over ``pairs`` (query, key) pairs, all heads together, the whole batch."""
    return 4 * B * d * sympify(pairs)


def projections(tokens: Expr | int) -> Expr:
    """Q, K, V and output projection of ``tokens`` tokens a batch row."""
    return linear(B * sympify(tokens), d, 4 * d)


def ffn(tokens: Expr | int) -> Expr:
    """Two-matrix feed-forward network of ``tokens`` tokens a batch row; 0 where f = 0."""
    return 4 * B * sympify(tokens) * d * f


def linear_parameters(into: Expr | int, out: Expr | int, bias: bool = True) -> Expr:
    """Parameters of a linear map."""
    return sympify(into) * out + (out if bias else 0)


def when_ffn(expression: Expr | int) -> Expr:
    """``expression`` where the layer has a feed-forward network, else 0."""
    return Piecewise((sympify(expression), f > 0), (0, True))


def largest(*parts: Expr | int) -> Expr:
    """``Max`` that SymPy does not try to decide: between long expressions that takes it up to seconds."""
    return Max(*(sympify(part) for part in parts), evaluate=False)


def tensor(*shape: Expr | int) -> Expr:
    """Bytes of a tensor in the cell's dtype."""
    size: Expr = e
    for side in shape:
        size = size * side
    return size
