"""Formulas for readers: text, growth, and MathML, which browsers draw themselves."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ctxbench.method import Method

if TYPE_CHECKING:
    from sympy import Expr

LONGEST = 220  # characters of text beyond which a drawn formula is wider than the page


@dataclass(frozen=True)
class Formula:
    """One term of a cost formula. ``mathml`` is empty where a drawing would be too wide to read."""

    term: str
    text: str
    growth: str
    mathml: str = ""


def formulas(method: Method | None, row: dict[str, Any]) -> tuple[list[Formula], str]:
    """FLOP terms, then their total, of the impl and mode of a row; or none and the sentence that says why."""
    if method is None:
        return [], "The method is not installed here, so its formulas are not known."
    if method.cost is None:
        return [], "The method declares no formula."
    from ctxbench.cost import big_o, total
    from ctxbench.cost.model import text

    try:
        params = method.params(**json.loads(row["params"]))
        cost = method.cost_of(row["impl"], row["mode"], bool(row["causal"]), row["position"], params)
        if cost is None:
            return [], "The method declares no formula for this implementation."
        terms = {**cost.flops, "total": total(cost.flops)}
        found = []
        for name, expression in terms.items():
            words = text(expression)
            drawn = mathml(expression) if len(words) <= LONGEST and name != "total" else ""
            found.append(Formula(name, words, big_o(expression), drawn))
    except Exception as error:  # a plug-in's cost function may raise anything
        return [], f"The formula could not be evaluated: {type(error).__name__}: {error}"
    return found, ""


@lru_cache(maxsize=1024)
def mathml(expression: Expr) -> str:
    """A formula as a ``<math>`` element; parameters appear under their own names, undivided.

    Empty for a formula with functions of a plug-in's own, whose names SymPy would not escape.
    """
    from sympy.core.function import AppliedUndef
    from sympy.printing.mathml import MathMLPresentationPrinter

    class Printer(MathMLPresentationPrinter):  # type: ignore[misc]
        def _element(self, tag: str, *children: Any) -> Any:
            element = self.dom.createElement(tag)
            for child in children:
                element.appendChild(self.dom.createTextNode(child) if isinstance(child, str) else child)
            return element

        def _print_Symbol(self, symbol: Any) -> Any:  # noqa: N802 (the name SymPy looks for)
            name = self._element("mi", html.escape(symbol.name))  # SymPy prints texts as they are
            if len(symbol.name) > 1:
                name.setAttribute("class", "name")
            return name

        def _print_Piecewise(self, piecewise: Any) -> Any:  # noqa: N802
            rows = [
                self._element(
                    "mtr",
                    self._element("mtd", self._print(value)),
                    self._element("mtd", self._element("mtext", "otherwise"))
                    if condition == True  # noqa: E712 (SymPy's own truth)
                    else self._element("mtd", self._element("mtext", "if "), self._print(condition)),
                )
                for value, condition in piecewise.args
            ]
            return self._element("mrow", self._element("mo", "{"), self._element("mtable", *rows))

    if expression.atoms(AppliedUndef):
        return ""
    return f"<math>{Printer().doprint(expression)}</math>"
