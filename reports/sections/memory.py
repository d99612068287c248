"""The second axis: memory sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from ctxbench.analysis.frame import MEASURED, views
from ctxbench.reports.figures import memory, scales
from ctxbench.reports.figures.points import LATENCY, MEMORY, Metric
from ctxbench.reports.palette import status_of
from ctxbench.reports.report import Chart, Report
from ctxbench.reports.swatch import legend
from ctxbench.units import format_tokens


def context(report: Report) -> dict[str, Any]:
    """What ``memory.j2`` prints: nothing but a sentence where no method was run at several memory sizes."""
    view = views(report.frame, across_memory=True)[0]
    sizes = view.frame.groupby(["method", "impl"])["memory"].transform("nunique")
    swept = view.frame[(sizes > 1) & view.frame["memory"].notna()]
    if swept.empty:
        return {"sentence": _single(report), "maps": [], "charts": []}
    measured = swept[swept["status"].isin(MEASURED)]
    length = _fixed_length(measured if len(measured) else swept)
    lengths = sorted(int(each) for each in swept["seq_len"].unique())
    charts = [{"metric": metric, "chart": _charts(report, swept, metric, lengths, length)}
              for metric in (LATENCY, MEMORY)]  # fmt: skip
    fixed = sorted(set(view.frame["method"]) - set(swept["method"]))
    return {"sentence": "", "charts": charts, "maps": _maps(swept), "length": format_tokens(length), "fixed": fixed,
            "lengths": [format_tokens(each) for each in lengths], "at": lengths.index(length),
            "legend": legend(swept, report.styles, report.looks, set(swept["series"]))}  # fmt: skip


def _charts(report: Report, swept: pd.DataFrame, metric: Metric, lengths: list[int], usual: int) -> Chart:
    """A chart for every length, of which the usual one is shown first."""
    charts, every = {}, memory.everything(swept, metric)
    for index, length in enumerate(lengths):
        table = every[every["seq_len"] == length]
        charts[length] = report.chart(
            f"memory-{metric.key}-{index}", f"{metric.title} at {format_tokens(length)} tokens against memory size",
            memory.interactive(table, metric, report.looks),
            partial(memory.static, table, metric, report.looks), draw=length == usual,
        )  # fmt: skip
    return charts[usual]


def _fixed_length(rows: pd.DataFrame) -> int:
    """The length with the most memory sizes, the longest of these."""
    count = rows.groupby("seq_len")["memory"].nunique()
    return int(count[count == count.max()].index.max())


def _maps(swept: pd.DataFrame) -> list[dict[str, Any]]:
    """A heat map for every series; one scale of colours for all, so that maps can be compared."""
    tables = {str(series): memory.data(rows, LATENCY) for series, rows in swept.groupby("series", sort=True)}
    values = [value for table in tables.values() for value in table.loc[table["kind"] == "measured", "value"]]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    maps = []
    for series, table in tables.items():
        lengths, sizes, cells = memory.grid(table)
        rows = [(format_tokens(size), [_tile(point, low, high) for point in row])
                for size, row in zip(sizes, cells, strict=True)]  # fmt: skip
        maps.append({"series": series, "lengths": [format_tokens(length) for length in lengths], "rows": rows})
    return maps


def _tile(point: dict[str, Any] | None, low: float, high: float) -> dict[str, str]:
    if point is None:
        return {"text": "", "title": "not planned", "color": "", "ink": ""}
    if point["kind"] != "measured":
        status = status_of(point["status"])
        return {"text": status.glyph, "title": point["hover"], "color": "", "ink": ""}
    color = memory.shade(point["value"], low, high)
    value = scales.text(point["value"], LATENCY.unit)
    return {"text": value, "title": point["hover"], "color": color, "ink": memory.ink_on(color)}


def _single(report: Report) -> str:
    rows = report.frame[["method", "memory"]].drop_duplicates()
    sizes = [f"{name} {format_tokens(int(size))}" for name, size in rows.itertuples(index=False) if not pd.isna(size)]
    none = [str(name) for name, size in rows.itertuples(index=False) if pd.isna(size)]
    text = "This run has one memory size for each method"
    text += f": {', '.join(sizes)} tokens per layer" if sizes else ""
    text += f"; {', '.join(none)} {'has' if len(none) == 1 else 'have'} none" if none else ""
    return text + "."
