"""How many cells there are, as formulas: what ``Scale`` says of one token, for any length."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, floor

from ctxbench.cost.symbols import param
from ctxbench.implementations.hierarchical.params import Scale


def most(scale: Scale) -> Expr:
    """Cells of a bounded scale that a token sees."""
    return param("window") if scale.span == 1 else param("cells")


def shown(scale: Scale, tokens: Expr) -> Expr:
    """Cells that the last of ``tokens`` tokens sees or has left behind."""
    return Max(0, floor((tokens - scale.behind) / scale.span)) if scale.behind else floor(tokens / scale.span)


def first(scale: Scale, tokens: Expr) -> Expr:
    """The first cell that the last of ``tokens`` tokens sees."""
    if scale.handed is not None:
        return scale.group * Max(0, floor((tokens - scale.handed) / (scale.span * scale.group)))
    return Integer(0) if scale.most is None else Max(0, floor((tokens - scale.behind) / scale.span) - most(scale))


def keeps(scale: Scale, tokens: Expr) -> Expr:
    """Cells that are remembered after ``tokens`` tokens."""
    complete = floor(tokens / scale.span)
    if scale.behind or scale.handed is not None:
        return complete - first(scale, tokens + int(scale.span == 1))
    return complete if scale.most is None else Min(complete, most(scale) - int(scale.span == 1))
