"""Formulas as Python functions: the same exact arithmetic as walking the tree, each shared part computed once.

A formula is written out once as the source of a function of its symbols, in integers where the result is one and in
fractions elsewhere. What it cannot express, and what goes wrong in it, is left to the walk in ``cost.model``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from sympy import Expr, Max, Min, Piecewise, ceiling, floor

RELATIONS = {
    sympy.StrictGreaterThan: ">", sympy.GreaterThan: ">=", sympy.StrictLessThan: "<", sympy.LessThan: "<=",
    sympy.Equality: "==", sympy.Unequality: "!=",
}  # fmt: skip
Function = Callable[[Mapping[str, Any]], "int | Fraction"]


class _Irregular(Exception):
    """The formula has a part that this arithmetic does not know."""


@lru_cache(maxsize=4096)
def compiled(expression: Expr) -> Function | None:
    """A function from the values of the symbols to the value of the formula; None where the walk must do it."""
    writer = _Writer()
    try:
        result = writer.number(expression)
    except _Irregular:
        return None
    source = "\n    ".join(["def value(values):", *writer.lines, f"return {result}"])
    scope: dict[str, Any] = {"Fraction": Fraction, "math": math, "plain": _plain, "quotient": _quotient}
    exec(source, scope)  # of names and operators written below, no text of the formula's author
    return scope["value"]  # type: ignore[no-any-return]


def _plain(value: Any) -> int | Fraction:
    """A value as exact arithmetic takes it."""
    return value if type(value) is int else Fraction(value)


def _quotient(above: int | Fraction, below: int | Fraction) -> int | Fraction:
    """An integer where there is one."""
    found = Fraction(above) / below
    return found.numerator if found.denominator == 1 else found


class _Writer:
    """Lines of the function's body, and the local name of every part written so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.indent, self.count = "", 0
        self.names: dict[Any, str] = {}

    def number(self, node: Any) -> str:
        """Write what computes a part; returns its name, or its text where it is a literal."""
        if node.is_Integer:
            return f"({int(node)})"
        if node not in self.names:
            self.names[node] = self._piecewise(node) if isinstance(node, Piecewise) else self._assign(self._text(node))
        return self.names[node]

    def _assign(self, text: str) -> str:
        self.count += 1
        self.lines.append(f"{self.indent}v{self.count} = {text}")
        return f"v{self.count}"

    def _text(self, node: Any) -> str:
        if node.is_Symbol:
            return f"plain(values[{node.name!r}])"
        if node.is_Rational:
            return f"Fraction({int(node.p)}, {int(node.q)})"
        if node.is_Add:
            return " + ".join(map(self.number, node.args))
        if node.is_Mul or node.is_Pow:
            above, below = self._fraction(node)
            return above if below is None else f"quotient({above}, {below})"
        if isinstance(node, (floor, ceiling)):
            above, below = self._fraction(node.args[0])
            return _rounded(above, below, up=isinstance(node, ceiling))
        if isinstance(node, sympy.Mod):
            return " % ".join(map(self.number, node.args))
        if isinstance(node, (Min, Max)):
            return f"{'min' if isinstance(node, Min) else 'max'}({', '.join(map(self.number, node.args))})"
        raise _Irregular

    def _fraction(self, node: Any) -> tuple[str, str | None]:
        """Numerator and denominator of a product, the latter None where it is 1."""
        above: list[str] = []
        below: list[str] = []
        for factor in node.args if node.is_Mul else (node,):
            base, power = factor.args if factor.is_Pow else (factor, sympy.Integer(1))
            if not power.is_Integer:
                raise _Irregular
            if factor.is_Rational and not factor.is_Integer:
                above.append(f"({int(factor.p)})")
                below.append(f"({int(factor.q)})")
            else:
                (below if power < 0 else above).append(
                    self.number(base) + (f"**{abs(int(power))}" if abs(power) != 1 else "")
                )
        return " * ".join(above) or "1", f"({' * '.join(below)})" if below else None

    def _piecewise(self, node: Piecewise) -> str:
        """Branches as nested conditions, so that a branch that does not hold is not computed."""
        self.count += 1
        name, outer, known = f"v{self.count}", self.indent, self.names
        for value, condition in node.args:
            self.lines.append(f"{self.indent}if {self._condition(condition)}:")
            inside, self.names = self.names, dict(self.names)
            self.indent += " "
            self.lines.append(f"{self.indent}{name} = {self.number(value)}")
            self.indent, self.names = self.indent[:-1], dict(inside)
            self.lines.append(f"{self.indent}else:")
            self.indent += " "
        self.lines.append(f"{self.indent}raise ValueError('no branch holds')")
        self.indent, self.names = outer, known
        return name

    def _condition(self, node: Any) -> str:
        if node in (True, sympy.true):
            return "True"
        if node in (False, sympy.false):
            return "False"
        if isinstance(node, (sympy.And, sympy.Or)):
            word = " and " if isinstance(node, sympy.And) else " or "
            return f"({word.join(map(self._condition, node.args))})"
        if isinstance(node, sympy.Not):
            return f"(not {self._condition(node.args[0])})"
        if type(node) not in RELATIONS:
            raise _Irregular
        left, right = (self.number(side) for side in node.args)
        return f"({left} {RELATIONS[type(node)]} {right})"


def _rounded(above: str, below: str | None, up: bool) -> str:
    if below is None:
        return f"math.{'ceil' if up else 'floor'}({above})"
    return f"-(-({above}) // {below})" if up else f"({above}) // {below}"
