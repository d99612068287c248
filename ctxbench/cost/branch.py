"""A formula near one length: every size but T a number, every choice and rounding decided. What is left fits a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from sympy import Expr, Max, Min, Mod, Piecewise, ceiling, floor

from ctxbench.cost.model import holds, value


def branch(expression: Expr, values: Mapping[str, Any]) -> Expr:
    """What a formula comes to at these sizes, as a polynomial in T alone.

    It has the formula's value there, and at every other length at which the same choices are made (of a peak: at which
    the same moment is the highest) and that leaves the same remainders, as multiples of all blocks do.
    """
    return sympy.expand(_decided(expression, values))


def _decided(node: Any, values: Mapping[str, Any]) -> Expr:
    if node.is_Symbol:
        return node if node.name == "T" else sympy.Integer(values[node.name])
    if not node.args:
        return node
    if isinstance(node, Piecewise):
        return _decided(next(part for part, condition in node.args if holds(condition, values)), values)
    if isinstance(node, (Max, Min)):  # of equal ones always the same, so that the same choice reads the same
        worth = {each: value(each, values) for each in node.args}
        best = (max if isinstance(node, Max) else min)(worth.values())
        return _decided(min((each for each in worth if worth[each] == best), key=_length), values)
    if isinstance(node, Mod):
        return _number(node, values)
    if isinstance(node, (floor, ceiling)):
        inside = _decided(node.args[0], values)
        if not inside.is_polynomial():  # a root or a logarithm
            return _number(node, values)
        return inside - _number(node.args[0], values) + _number(node, values)
    return node.func(*(_decided(argument, values) for argument in node.args))


def _number(node: Any, values: Mapping[str, Any]) -> Expr:
    found = value(node, values)
    return sympy.Rational(found.numerator, found.denominator)


def _length(node: Any) -> tuple[int, str]:
    written = str(node)
    return len(written), written
