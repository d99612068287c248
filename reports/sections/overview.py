"""Latency, peak memory and FLOPs against the length, with one legend for all."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ctxbench.analysis.frame import View
from ctxbench.reports.figures import overview
from ctxbench.reports.figures.points import METRICS
from ctxbench.reports.palette import DASHES, STATUSES, Style
from ctxbench.reports.report import Report

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


def context(report: Report) -> dict[str, Any]:
    """What ``overview.j2`` prints."""
    shown = report.shown(report.views[0])
    methods = []
    for name, rows in report.frame.groupby("method", sort=True):
        series = [{"label": label, "name": label.removeprefix(f"{name} / "), "impl": impl, "shown": label in shown}
                  for label, impl in rows[["series", "impl"]].drop_duplicates().itertuples(index=False)]  # fmt: skip
        methods.append({"name": name, "swatch": swatch(report.styles[str(name)]), "series": series})
    present = [name for name in STATUSES if name in set(report.frame["status"])]
    return {
        "views": [
            {
                "label": view.label or "all rows",
                "charts": _charts(report, view, index),
                "shown": sorted(report.shown(view)),
            }
            for index, view in enumerate(report.views)
        ],
        "legend": methods,
        "impls": sorted(report.frame["impl"].unique()),
        "symbols": [STATUSES[name] for name in present if name not in ("ok", "unstable")],
    }


def _charts(report: Report, view: View, index: int) -> list[dict[str, Any]]:
    charts = []
    shown = report.shown(view)
    for metric in METRICS:
        table = overview.data(view.frame, metric)
        caption = f"{metric.title} against sequence length" + (f", {view.label}" if view.label else "")
        chart = report.chart(
            f"overview-{metric.key}-{index}",
            caption,
            overview.interactive(table, metric, report.styles, shown),
            overview.static(table, metric, report.styles, shown),
        )
        charts.append({"metric": metric, "chart": chart})
    return charts


def swatch(style: Style) -> Markup:
    """Line and marker of a method as a small SVG."""
    dash = "" if style.dash == DASHES[0] else f' stroke-dasharray="{style.dash.replace("px", "")}"'
    return Markup(
        f'<svg class="swatch" viewBox="-16 -6 32 12" aria-hidden="true" fill="{style.color}">'
        f'<path d="M-15 0H15" stroke="{style.color}" stroke-width="2"{dash}/>{SHAPES[style.marker]}</svg>'
    )
