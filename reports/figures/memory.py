"""The memory size as second axis: a heat map of length x memory size, and the cost at one length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.frame import records
from ctxbench.analysis.printable import printable
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.overview import LENGTH
from ctxbench.reports.figures.plotly_json import axis, hover, layout, ticks
from ctxbench.reports.figures.points import Metric, points
from ctxbench.reports.palette import DARK, LIGHT, MPL_DASHES, MPL_MARKERS, Style, contrast, status_of
from ctxbench.units import format_tokens

SIZE = "memory size (tokens per layer)"
# Light to dark in equal steps, one hue: readable as grey too.
RAMP = ("#e3ecf7", "#c3d7ef", "#9dbde4", "#7aa1d6", "#5a84c4", "#4068ac", "#2b4d8e", "#1b356b")


def data(series: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Points of one series over length and memory size: the columns of ``points`` and ``memory``."""
    found = [points(rows, metric).assign(memory=int(str(memory))) for memory, rows in series.groupby("memory")]
    return pd.concat(found, ignore_index=True) if found else points(series.iloc[:0], metric).assign(memory=0)


def grid(table: pd.DataFrame) -> tuple[list[int], list[int], list[list[dict[str, Any] | None]]]:
    """Lengths, memory sizes, and the cell for each pair: a measured point, else a missing one, else None."""
    lengths, sizes = (sorted(int(value) for value in table[name].unique()) for name in ("seq_len", "memory"))
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    rank = {"forecast": 0, "missing": 1, "measured": 2}
    for point in records(table.sort_values("kind", key=lambda kind: kind.map(rank))):
        cells[point["memory"], point["seq_len"]] = point
    return lengths, sizes, [[cells.get((size, length)) for length in lengths] for size in sizes]


def shade(value: float, low: float, high: float) -> str:
    """Colour of a value between the smallest and the largest of all heat maps, on a logarithmic scale."""
    share = 0.5 if high <= low else (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return RAMP[min(len(RAMP) - 1, max(0, int(share * len(RAMP))))]


def ink_on(color: str) -> str:
    """The ink of a text on this colour: the one with the higher contrast."""
    return max((LIGHT, DARK), key=lambda ink: contrast(color, ink))


def everything(swept: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """Points of all series at all lengths and memory sizes."""
    found = [data(mine, metric) for _, mine in swept.groupby("series")]
    return pd.concat(found, ignore_index=True) if found else points(swept, metric).assign(memory=0)


def at_length(frame: pd.DataFrame, seq_len: int, metric: Metric) -> pd.DataFrame:
    """Points of all series at one length over the memory size; series without a memory size are left out."""
    return everything(frame[(frame["seq_len"] == seq_len) & frame["memory"].notna()], metric)


def interactive(table: pd.DataFrame, metric: Metric, styles: Mapping[str, Style]) -> dict[str, Any]:
    """Plotly JSON of the cost at one length against the memory size."""
    sizes = sorted(int(size) for size in table["memory"].unique())
    drawn = table[table["kind"] != "missing"]
    traces = []
    for series, mine in drawn.groupby("series", sort=True):
        style, mine = styles[str(series)], mine.sort_values("memory")
        hollow = [f"{style.marker}-open" if kind == "forecast" else style.marker for kind in mine["kind"]]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": hover(str(series)),
            "x": [int(size) for size in mine["memory"]],
            "y": [float(value) for value in mine["value"]], "text": [hover(text) for text in mine["hover"]],
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": style.color, "width": style.width, "dash": style.dash},
            "error_y": {"type": "data", "symmetric": False, "array": list(mine["high"] - mine["value"]),
                        "arrayminus": list(mine["value"] - mine["low"]), "thickness": 1, "width": 2},
            "marker": {"color": style.color, "symbol": hollow, "size": style.size},
            "meta": {"role": "data", "series": str(series)},
        })  # fmt: skip
    return {
        "data": traces,
        "layout": layout(
            xaxis=axis(type="log", range=scales.log_range(sizes), title={"text": SIZE, "standoff": 6},
                       **ticks(*scales.token_ticks(sizes or [1], most=8))),
            yaxis=axis(type="log", range=scales.log_range(drawn["value"]),
                       **ticks(*scales.log_ticks(drawn["value"], metric.unit))),
        ),
    }  # fmt: skip


def static(table: pd.DataFrame, metric: Metric, styles: Mapping[str, Style], legend: bool = False) -> Figure:
    """Cost at one length against the memory size, on paper."""
    with canvas.style():
        chart = canvas.figure(6.4 if legend else 4.4, 3.2)
        axes = chart.subplots()
        drawn = table[table["kind"] != "missing"]
        for series, mine in drawn.groupby("series", sort=True):
            style, mine = styles[str(series)], mine.sort_values("memory")
            axes.plot(
                mine["memory"],
                mine["value"],
                color=style.color,
                linestyle=MPL_DASHES[style.dash],
                label=str(series),
            )
            for kind, face in (("measured", style.color), ("forecast", "none")):
                some = mine[mine["kind"] == kind]
                axes.plot(some["memory"], some["value"], linestyle="none", marker=MPL_MARKERS[style.marker],
                          color=style.color, markerfacecolor=face, label="_points")  # fmt: skip
        sizes = sorted(int(size) for size in table["memory"].unique()) or [1]
        canvas.bare_log(axes, "x", *scales.token_ticks(sizes, most=8))
        canvas.bare_log(axes, "y", *scales.log_ticks(drawn["value"], metric.unit))
        axes.set_xlabel(SIZE)
        if legend:
            axes.set_title(f"{metric.title}: {metric.note}", fontsize=9, loc="left")
            axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
        return chart


def heat_map(table: pd.DataFrame, metric: Metric, title: str) -> Figure:
    """One series as a heat map on paper: every cell carries its number, or the symbol of its status."""
    lengths, sizes, cells = grid(table)
    values = [p["value"] for row in cells for p in row if p and p["kind"] == "measured"]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    with canvas.style():
        chart = canvas.figure(1.2 + 0.75 * len(lengths), 0.9 + 0.34 * len(sizes))
        axes = chart.subplots()
        axes.grid(visible=False)
        for y, row in enumerate(cells):
            for x, point in enumerate(row):
                known = point is not None and point["kind"] == "measured"
                color = shade(point["value"], low, high) if point is not None and known else "none"
                axes.add_patch(_tile(x, y, color))
                text = "" if point is None else scales.text(point["value"], metric.unit) if known else ""
                text = text or ("" if point is None else status_of(point["status"]).words)
                ink = ink_on(color) if known else canvas.INK
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(-0.5, len(sizes) - 0.5)
        axes.set_xticks(range(len(lengths)), [format_tokens(length) for length in lengths])
        axes.set_yticks(range(len(sizes)), [format_tokens(size) for size in sizes])
        axes.set_xlabel(LENGTH)
        axes.set_ylabel("memory (tokens)")
        axes.set_title(printable(title), fontsize=9, loc="left")
        return chart


def _tile(x: int, y: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=canvas.GRID, linewidth=0.4)
