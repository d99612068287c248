"""How many cells there are, as formulas: what ``Scale`` says of one token, for any length."""

from __future__ import annotations

from sympy import Expr, Min, floor

from ctxbench.cost.symbols import param
from ctxbench.implementations.hierarchical.params import Scale


def most(scale: Scale) -> Expr:
    """Cells of a bounded scale that a token sees."""
    return param("window") if scale.span == 1 else param("cells")


def keeps(scale: Scale, tokens: Expr) -> Expr:
    """Cells that are remembered after ``tokens`` tokens."""
    complete = floor(tokens / scale.span)
    return complete if scale.most is None else Min(complete, most(scale) - int(scale.span == 1))
