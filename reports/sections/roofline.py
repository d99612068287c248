"""How close to the limits of the machine every series works."""

from __future__ import annotations

from functools import partial
from typing import Any

from ctxbench.analysis.frame import View
from ctxbench.reports.figures import roofline, scales
from ctxbench.reports.report import Report
from ctxbench.reports.swatch import legend
from ctxbench.units import counted, format_tokens


def context(report: Report) -> dict[str, Any]:
    """What ``roofline.j2`` prints: a chart a view, and where each series stands at its longest length."""
    charts = []
    for index, view in enumerate(report.views):
        ceilings, shown = report.ceilings(view), report.shown(view)
        table = roofline.data(view.frame, ceilings)
        caption = "Attained FLOP/s against arithmetic intensity" + (f", {view.label}" if view.label else "")
        charts.append(
            report.chart(
                f"roofline-{index}",
                caption,
                roofline.interactive(table, report.looks, ceilings, shown),
                partial(roofline.static, table, report.looks, ceilings, shown),
                draw=index == 0,
            )
        )
    first = report.views[0]
    table = roofline.data(first.frame, report.ceilings(first))
    return {
        "chart": charts[0] if len(table) else None,
        "legend": legend(report.frame, report.styles, report.looks, report.shown(first)),
        "head": ("method, impl", "tokens", "FLOP per byte", "least traffic", "attained", "of the roof"),
        "lines": _lines(table),
        "sentence": _sentence(report, first, table),
    }


def _lines(table: Any) -> list[tuple[str, ...]]:
    longest = table.sort_values("seq_len").groupby("series", sort=True).tail(1).sort_values("series")
    columns = ["series", "seq_len", "intensity", "least", "rate", "share"]
    return [
        (series, format_tokens(length), f"{intensity:.3g}", f"{least:.3g}", scales.text(rate, "FLOP/s"),
         "" if share != share else f"{100 * share:.3g} %")
        for series, length, intensity, least, rate, share in longest[columns].itertuples(index=False)
    ]  # fmt: skip


def _sentence(report: Report, view: View, table: Any) -> str:
    if table.empty:
        return "No row of this run has a time, FLOPs and the bytes its operators moved, so there is no point to draw."
    ceilings = report.ceilings(view)
    if ceilings is None:
        return "This run left no calibration of its machine, so no ceiling is drawn."
    threads = counted(ceilings.threads, "thread") if ceilings.threads else "all cores"
    rates = ", ".join(f"{scales.text(rate, 'FLOP/s')} in {dtype}" for dtype, rate in ceilings.flops_per_s.items())
    return (
        f"Ceilings measured on {ceilings.device} with {threads}: products of matrices {rates}; "
        f"a copy {scales.text(ceilings.bytes_per_s, 'B/s')}, read plus write."
    )
