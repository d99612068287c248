"""What a formula is, and everything that is derived from it: integers, slopes, big-O, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from sympy import Expr, Max, Min, Piecewise, Symbol, ceiling, floor
from sympy.printing.str import StrPrinter

from ctxbench.cost.compiled import compiled
from ctxbench.errors import CtxbenchError

FACTORED = 400  # characters of a formula beyond which nobody reads it, factored or not


@dataclass(frozen=True)
class Cost:
    """Closed forms of one impl in one mode, over the letters of ``cost.symbols`` and the method's parameters.

    Attributes:
        algorithmic: FLOPs the mathematics needs, by term (``projections``, ``attention``, ``ffn``, ...).
        flops: FLOPs this impl executes, by term; in ``train`` mode forward plus backward.
        num_parameters: trainable elements.
        state_bytes: bytes carried after T tokens; 0 for a method that carries nothing.
        peak_bytes: allocator peak above parameters, inputs and incoming state, output included. ``train`` adds the
            gradients. None where it is not known.
        least_bytes: traffic no program avoids: inputs, outputs, weights and state once. None: derived from the others.
        depth: length of the chain of dependent steps, in layer evaluations (L when a layer is one step).
    """

    algorithmic: Mapping[str, Expr]
    flops: Mapping[str, Expr]
    num_parameters: Expr
    state_bytes: Expr = field(default_factory=lambda: sympy.Integer(0))
    peak_bytes: Expr | None = None
    least_bytes: Expr | None = None
    depth: Expr | None = None


def total(terms: Mapping[str, Expr]) -> Expr:
    """Sum of all terms."""
    return sympy.Add(*terms.values())


def evaluate(expression: Expr | int, values: Mapping[str, Any]) -> int:
    """Exact integer value of a formula; no floating point is involved.

    Raises:
        CtxbenchError: when a symbol has no value or the result is not an integer.
    """
    result = value(expression, values)
    if result.denominator != 1:
        raise CtxbenchError(f"the formula {expression} is {result}, not an integer, at {dict(values)}")
    return result.numerator


def value(expression: Expr | int, values: Mapping[str, Any]) -> int | Fraction:
    """Exact value of a formula, or of a part of one, which need not be an integer."""
    formula = sympy.sympify(expression)
    function = compiled(formula)
    try:
        return function(values) if function else _exact(formula, values)
    except Exception:  # the walk says what is wrong
        return _exact(formula, values)


def _exact(node: Any, values: Mapping[str, Any], smoothed: bool = False) -> Fraction:
    """Value of a formula.

    ``smoothed`` leaves rounding out (``floor(x)`` is x, ``Mod`` is 0), for slopes and asymptotics, and admits roots and
    logarithms in floating point.
    """
    if node.is_Symbol:
        if node.name not in values:
            raise CtxbenchError(f"the formula uses {node.name!r}, which has no value here (known: {', '.join(values)})")
        return Fraction(values[node.name])
    if node.is_Rational:
        return Fraction(int(node.p), int(node.q))
    if isinstance(node, Piecewise):
        for branch in node.args:
            if holds(branch.args[1], values, smoothed):
                return _exact(branch.args[0], values, smoothed)
        raise CtxbenchError(f"no branch of {node} holds")
    if smoothed and isinstance(node, (floor, ceiling)):
        return _exact(node.args[0], values, smoothed)
    if smoothed and isinstance(node, sympy.Mod):
        return Fraction(0)
    if isinstance(node, (floor, ceiling)) and _irrational(node):  # SymPy decides these to as many digits as it takes
        return Fraction(int(node.subs({symbol: values.get(symbol.name, symbol) for symbol in node.free_symbols})))
    arguments = [_exact(argument, values, smoothed) for argument in node.args]
    if node.is_Add:
        return sum(arguments, Fraction(0))
    if node.is_Mul:
        return math.prod(arguments, start=Fraction(1))
    if node.is_Pow and arguments[1].denominator == 1:
        return arguments[0] ** int(arguments[1])
    if isinstance(node, floor):
        return Fraction(math.floor(arguments[0]))
    if isinstance(node, ceiling):
        return Fraction(math.ceil(arguments[0]))
    if isinstance(node, sympy.Mod):
        return arguments[0] % arguments[1]
    if isinstance(node, Min):
        return min(arguments)
    if isinstance(node, Max):
        return max(arguments)
    if smoothed and node.is_Pow:
        return Fraction(float(arguments[0]) ** float(arguments[1]))
    if smoothed and isinstance(node, sympy.log):
        return Fraction(math.log(arguments[0]))
    raise CtxbenchError(
        "formulas may use + - * / ** floor ceiling Mod Min Max Piecewise, and roots and logarithms inside floor "
        f"or ceiling, not {type(node).__name__}"
    )


def _irrational(node: Any) -> bool:
    return bool(node.has(sympy.log) or any(not power.exp.is_integer for power in node.atoms(sympy.Pow)))


def holds(condition: Any, values: Mapping[str, Any], smoothed: bool = False) -> bool:
    """Whether the condition of a case is met at these values; ``smoothed`` as of the formula around it."""
    if condition in (True, sympy.true):
        return True
    if condition in (False, sympy.false):
        return False
    if isinstance(condition, sympy.And):
        return all(holds(part, values, smoothed) for part in condition.args)
    if isinstance(condition, sympy.Or):
        return any(holds(part, values, smoothed) for part in condition.args)
    if isinstance(condition, sympy.Not):
        return not holds(condition.args[0], values, smoothed)
    left, right = (_exact(side, values, smoothed) for side in condition.args)
    return {
        sympy.StrictGreaterThan: left > right,
        sympy.GreaterThan: left >= right,
        sympy.StrictLessThan: left < right,
        sympy.LessThan: left <= right,
        sympy.Equality: left == right,
        sympy.Unequality: left != right,
    }[type(condition)]


def local_slope(expression: Expr, values: Mapping[str, Any]) -> float:
    """Slope of log cost against log T at this length, ``T f'(T) / f(T)``, by a central difference over +-1 %."""
    step = Fraction(1, 100)
    high = _exact(expression, {**values, "T": Fraction(values["T"]) * (1 + step)}, smoothed=True)
    low = _exact(expression, {**values, "T": Fraction(values["T"]) / (1 + step)}, smoothed=True)
    if low <= 0 or high <= 0:
        return 0.0
    return float(math.log(high / low) / (2 * math.log(1 + step)))


@lru_cache(maxsize=1024)
def big_o(expression: Expr) -> str:
    """Growth in T with every other size fixed: ``O(1)``, ``O(T)``, ``O(T log T)``, ``O(T^2)``.

    The exponent is the slope between two lengths far beyond every other size, where lower terms have vanished.
    """
    values: dict[str, Any] = dict.fromkeys(free_names(expression), 8)
    first, second = (_exact(expression, {**values, "T": Fraction(10) ** power}, smoothed=True) for power in (18, 24))
    if first <= 0 or second <= 0:
        return "O(1)"
    slope = (math.log10(second.numerator) - math.log10(second.denominator)
             - math.log10(first.numerator) + math.log10(first.denominator)) / 6  # fmt: skip
    exponent = round(2 * slope) / 2
    # log10 T grows from 18 to 24 between the two lengths, which adds log10(24 / 18) / 6 = 0.021 to the slope.
    factor = " log T" if slope - exponent > 0.01 else ""
    if exponent == 0:
        return f"O({factor.strip() or '1'})"
    power = "T" if exponent == 1 else f"T^{exponent:g}"
    return f"O({power}{factor})"


def latex(expression: Expr) -> str:
    """LaTeX of a formula; parameters appear under their own names."""
    names = {s: r"\mathrm{" + s.name.replace("_", r"\_") + "}" for s in expression.free_symbols if len(s.name) > 1}
    return str(sympy.latex(expression, symbol_names=names))


@lru_cache(maxsize=1024)
def text(expression: Expr) -> str:
    """One-line text of a formula, factored where that makes it shorter and does not take SymPy seconds."""
    written = plain(expression)
    if len(written) > FACTORED:
        return written
    return min(plain(sympy.factor_terms(expression)), written, key=len)


def plain(expression: Expr) -> str:
    """One-line text of a formula as it stands."""
    return str(_PLAIN.doprint(expression)).replace("**", "^")


class _Plain(StrPrinter):  # type: ignore[misc]
    """Text with cases as a sentence has them: ``(T if T < window else window)``."""

    def _print_Piecewise(self, node: Piecewise) -> str:  # noqa: N802 - the name that SymPy looks for
        words = [
            self._print(part) + ("" if condition in (True, sympy.true) else f" if {self._print(condition)}")
            for part, condition in node.args
        ]
        return f"({' else '.join(words)})"


_PLAIN = _Plain()


def free_names(expression: Expr) -> set[str]:
    """Names of the symbols a formula uses."""
    return {s.name for s in expression.free_symbols if isinstance(s, Symbol)}
