"""Plotly figures as plain JSON: the parts every chart shares, and the escaping of text from rows."""

from __future__ import annotations

import html
import textwrap
from typing import Any

from ctxbench.analysis.printable import printable

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
            "ticks": "", "fixedrange": False, **changes}  # fmt: skip


def ticks(positions: list[Any], texts: list[str]) -> dict[str, Any]:
    """A fixed list of ticks."""
    return {"tickmode": "array", "tickvals": positions, "ticktext": texts}
