"""Plotly figures as plain JSON: the parts every chart shares, and the escaping of text from rows."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ctxbench.analysis.printable import printable
from ctxbench.reports.palette import Style

GRID, INK = "#8a8f98", "#6b7280"  # replaced in the browser by the colours of the theme


def hover(text: str) -> str:
    """Escape and wrap a text for Plotly, which interprets a subset of HTML; directions of writing are isolated."""
    lines = []
    for line in printable(text).splitlines()[:8]:
        wrapped = textwrap.wrap(line, 64, max_lines=4, placeholder=" \u2026") or [""]
        lines += [f"\u2068{html.escape(part)}\u2069" for part in wrapped]
    return "<br>".join(lines)


def layout(**changes: Any) -> dict[str, Any]:
    """Layout of every chart: transparent, no title and no legend of its own (the page has one for all charts)."""
    return {
        "template": None,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": "zoom",
        "margin": {"l": 56, "r": 10, "t": 6, "b": 40, "pad": 2},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "hoverlabel": {"align": "left", "font": {"size": 12}},
        **changes,
    }


def axis(**changes: Any) -> dict[str, Any]:
    """An axis with a faint grid and nothing else."""
    return {"zeroline": False, "showline": False, "gridcolor": GRID, "gridwidth": 1, "automargin": True,
            "ticks": "", "tickangle": 0, "fixedrange": False, **changes}  # fmt: skip


def ticks(positions: list[Any], texts: list[str]) -> dict[str, Any]:
    """A fixed list of ticks."""
    return {"tickmode": "array", "tickvals": positions, "ticktext": texts}


def note(x: float, y: float, text: str, **changes: Any) -> dict[str, Any]:
    """A text beside a point of two logarithmic axes; ``text`` is escaped already."""
    from math import log10

    return {"x": log10(x), "y": log10(y), "text": text, "showarrow": False, "font": {"size": 11}, "xanchor": "left",
            "yanchor": "middle", **changes}  # fmt: skip


Bounds = tuple[Iterable[float], Iterable[float]]


def scatter(
    x: Iterable[float], y: Iterable[float], texts: Iterable[str], *, mode: str = "lines+markers", role: str = "data",
    series: str = "", style: Style | None = None, visible: bool = True, symbols: Sequence[str] | None = None,
    sizes: Sequence[float] | None = None, x_bounds: Bounds | None = None, y_bounds: Bounds | None = None, **looks: Any,
) -> dict[str, Any]:  # fmt: skip
    """A trace in the look of its series, or in the ink of the page (``role="ink"``); bounds become bars."""
    xs, ys = [_number(value) for value in x], [_number(value) for value in y]
    trace: dict[str, Any] = {
        "type": "scatter", "mode": mode, "x": xs, "y": ys, "text": [hover(text) for text in texts],
        "hovertemplate": "%{text}<extra></extra>", "visible": visible, "meta": {"role": role, "series": series},
    }  # fmt: skip
    if style is None:
        return trace | {"line": {"color": INK}, "marker": {"color": INK}} | looks
    trace |= {
        "name": hover(series),
        "line": {"color": style.color, "width": style.width, "dash": style.dash},
        "marker": {"color": style.color, "symbol": symbols or style.marker, "size": sizes or style.size},
    }
    if sizes:  # Plotly gives markers of several sizes a line of another colour
        trace["marker"] |= {"opacity": 1, "line": {"width": 1.5, "color": style.color}}
    for name, values, bounds in (("error_x", xs, x_bounds), ("error_y", ys, y_bounds)):
        if bounds:
            trace[name] = bars(values, *bounds, style.color)
    return trace | looks


def bars(values: Sequence[float | None], low: Iterable[float], high: Iterable[float], color: str) -> dict[str, Any]:
    """Bars from the low to the high ends around values."""
    ends = [(value or 0.0, _number(a), _number(b)) for value, a, b in zip(values, low, high, strict=True)]
    return {
        "type": "data", "symmetric": False, "array": [max(0.0, (b if b is not None else v) - v) for v, _, b in ends],
        "arrayminus": [max(0.0, v - (a if a is not None else v)) for v, a, _ in ends], "thickness": 1, "width": 2,
        "color": color,
    }  # fmt: skip


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)
