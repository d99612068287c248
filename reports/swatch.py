"""The key to a method: its line and marker as a small SVG, and the legend made of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd
from markupsafe import Markup

from ctxbench.analysis.printable import printable
from ctxbench.reports.palette import DASHES, Style

# Outlines in a box of 10 x 10 around the origin, as Plotly draws the symbols.
SHAPES = {
    "circle": '<circle r="3.6"/>',
    "square": '<path d="M-3.3-3.3h6.6v6.6h-6.6z"/>',
    "diamond": '<path d="M0-4.4 4.4 0 0 4.4-4.4 0z"/>',
    "triangle-up": '<path d="M0-4 4 3.2H-4z"/>',
    "triangle-down": '<path d="M0 4 4-3.2H-4z"/>',
    "star": '<path d="M0-4.6 1.1-1.5 4.4-1.4 1.8.6 2.7 3.7 0 1.9-2.7 3.7-1.8.6-4.4-1.4-1.1-1.5z"/>',
    "pentagon": '<path d="M0-4.2 4-1.3 2.5 3.4H-2.5L-4-1.3z"/>',
    "cross": '<path d="M-1.4-4h2.8v2.6H4v2.8H1.4V4h-2.8V1.4H-4v-2.8h2.6z"/>',
}


def swatch(style: Style, marker: bool = True) -> Markup:
    """Line and marker of a series as a small SVG."""
    dash = "" if style.dash == DASHES[0] else f' stroke-dasharray="{style.dash.replace("px", "")}"'
    return Markup(
        f'<svg class="swatch" viewBox="-16 -6 32 12" aria-hidden="true" fill="{style.color}">'
        f'<path d="M-15 0H15" stroke="{style.color}" stroke-width="{style.width}"{dash}/>'
        f"{SHAPES[style.marker] if marker else ''}</svg>"
    )


def legend(
    frame: pd.DataFrame, methods: Mapping[str, Style], series: Mapping[str, Style], shown: Collection[str]
) -> list[dict[str, Any]]:
    """An entry a method with one chip for each of its series in the frame; ``shown`` are pressed at first.

    A series that was never timed has a chip in the first legend alone: only charts over the length draw it.
    """
    timed = set(frame.loc[frame["latency_s"].notna(), "series"])
    entries = []
    for name, rows in frame.groupby("method", sort=True):
        start = f"{printable(str(name))} / "
        chips = [{"label": label, "name": label.removeprefix(start), "impl": impl, "shown": label in shown,
                  "timed": label in timed,
                  "line": swatch(series[label], marker=False)}
                 for label, impl in rows[["series", "impl"]].drop_duplicates().itertuples(index=False)]  # fmt: skip
        entries.append({"name": printable(str(name)), "swatch": swatch(methods[str(name)]), "series": chips})
    return entries
