"""Latency, peak memory and FLOPs against the length, with one legend for all."""

from __future__ import annotations

from functools import partial
from typing import Any

from ctxbench.analysis.frame import MEASURED, View
from ctxbench.reports.figures import overview
from ctxbench.reports.figures.points import MEMORY, METRICS
from ctxbench.reports.palette import STATUSES
from ctxbench.reports.report import Report
from ctxbench.reports.swatch import legend
from ctxbench.units import format_tokens


def context(report: Report) -> dict[str, Any]:
    """What ``overview.j2`` prints."""
    shown = report.shown(report.views[0])
    order = _by_memory(report.views)
    entries = legend(report.frame, report.styles, report.looks, shown)
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
        "legend": entries,
        "untimed": sum(not series["timed"] for entry in entries for series in entry["series"]),
        "impls": sorted(report.frame["impl"].unique()),
        "sizes": [_size(report.views[index]) for index in order],
        "order": order,
        "start": order.index(0) if order else 0,
        "symbols": [STATUSES[name] for name in present if name not in MEASURED],
        "unmetered": _unmetered(report),
    }


def _unmetered(report: Report) -> bool:
    """Whether a cell has a time and no peak: its symbol in the strip is that of its status."""
    timed = report.frame[report.frame["status"].isin(MEASURED)]
    return bool(timed[list(MEMORY.measured)].isna().all(axis=1).any())


def _by_memory(views: list[View]) -> list[int]:
    """Indices of the views by memory size, where they differ in nothing else; else none."""
    sizes = [view.values.get("memory") if set(view.values) == {"memory"} else None for view in views]
    known = [size for size in sizes if size is not None]
    return sorted(range(len(views)), key=lambda index: known[index]) if len(known) == len(views) > 1 else []


def _size(view: View) -> str:
    return format_tokens(int(view.values["memory"]))


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
            partial(overview.static, table, metric, report.looks, shown),
        )
        charts.append({"metric": metric, "chart": chart})
    return charts
