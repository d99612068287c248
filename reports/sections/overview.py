"""Latency, peak memory and FLOPs against the length, with one legend for all."""

from __future__ import annotations

from typing import Any

from ctxbench.analysis.frame import View
from ctxbench.analysis.printable import printable
from ctxbench.reports.figures import overview
from ctxbench.reports.figures.points import METRICS
from ctxbench.reports.palette import STATUSES
from ctxbench.reports.report import Report
from ctxbench.reports.swatch import swatch


def context(report: Report) -> dict[str, Any]:
    """What ``overview.j2`` prints."""
    shown = report.shown(report.views[0])
    methods = []
    for name, rows in report.frame.groupby("method", sort=True):
        start = f"{printable(str(name))} / "
        series = [{"label": label, "name": label.removeprefix(start), "impl": impl, "shown": label in shown,
                   "line": swatch(report.looks[label], marker=False)}
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
            overview.interactive(table, metric, report.looks, shown),
            overview.static(table, metric, report.looks, shown),
        )
        charts.append({"metric": metric, "chart": chart})
    return charts
