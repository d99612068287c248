"""Formulas for readers: text, growth, and LaTeX drawn by matplotlib's mathtext as SVG with the text as alternative."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

from ctxbench.method import Method

LONGEST = 220  # characters of text beyond which a drawn formula is wider than the page


@dataclass(frozen=True)
class Formula:
    """One term of a cost formula. ``image`` is a data URI of an SVG, empty where mathtext cannot draw the LaTeX."""

    term: str
    text: str
    latex: str
    growth: str
    image: str = ""
    height_em: float = 0.0


def formulas(method: Method | None, row: dict[str, Any]) -> tuple[list[Formula], str]:
    """FLOP terms, then their total, of the impl and mode of a row; or none and the sentence that says why."""
    if method is None:
        return [], "The method is not installed here, so its formulas are not known."
    if method.cost is None:
        return [], "The method declares no formula."
    from ctxbench.cost import big_o, latex, total
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
            image, height = draw(latex(expression)) if len(words) <= LONGEST and name != "total" else ("", 0.0)
            found.append(Formula(name, words, latex(expression), big_o(expression), image, height))
    except Exception as error:  # a plug-in's cost function may raise anything
        return [], f"The formula could not be evaluated: {type(error).__name__}: {error}"
    return found, ""


def draw(latex: str) -> tuple[str, float]:
    """A formula as the data URI of an SVG and its height in em; empty and 0 where mathtext does not know the LaTeX."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    size = 12.0
    source = f"${latex}$"
    try:
        width, height, depth, _, _ = MathTextParser("path").parse(source, dpi=72, prop=FontProperties(size=size))
    except (ValueError, RuntimeError):
        return "", 0.0
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ctxbench", "mathtext.fontset": "cm"}):
        pad = 2.0
        figure = Figure(figsize=((width + 2 * pad) / 72, (height + depth + 2 * pad) / 72))
        figure.text(pad / (width + 2 * pad), (depth + pad) / (height + depth + 2 * pad), source, fontsize=size)
        buffer = io.BytesIO()
        try:
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        except (ValueError, RuntimeError):
            return "", 0.0
    from ctxbench.reports.figures.canvas import compact

    encoded = base64.b64encode(compact(buffer.getvalue().decode()).encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}", (height + depth + 2 * pad) / size
