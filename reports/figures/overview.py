"""A metric against the sequence length: one line a series, hollow forecasts, a strip of symbols for what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.frame import records
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.plotly_json import axis, hover, layout, ticks
from ctxbench.reports.figures.points import ABREAST, Metric, points, stacks
from ctxbench.reports.palette import MPL_DASHES, MPL_MARKERS, Style, status_of

LENGTH = "sequence length (tokens)"
ROW = 0.035  # share of the chart's height that one row of the strip takes
STEP = 0.22  # octaves between symbols side by side


def data(frame: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """The points of one chart; see :func:`points`."""
    return points(frame, metric)


def interactive(
    table: pd.DataFrame, metric: Metric, styles: Mapping[str, Style], shown: set[str] | None = None
) -> dict[str, Any]:
    """Plotly JSON; ``shown`` names the series that are visible at first, ``meta`` of a trace says what it is."""
    if table.empty:
        return {"data": [], "layout": layout()}
    places = stacks(table)
    traces = []
    lengths = sorted(int(length) for length in table["seq_len"].unique())
    for series, mine in table.groupby("series", sort=True):
        style = styles[str(series)]
        visible = shown is None or series in shown
        for trace in (_measured(mine, lengths, style), _forecast(mine, style), _missing(mine, style, places)):
            if trace:
                trace |= {"name": hover(str(series)), "visible": visible, "hovertemplate": "%{text}<extra></extra>"}
                trace["meta"] |= {"series": str(series)}
                traces.append(trace)
    values = table["value"].dropna()
    rows = 1 + max((row for _, row in places.values()), default=-1)
    top = 1 - ROW * rows - 0.02 if rows else 1.0
    positions, texts = scales.token_ticks(lengths, most=8)
    return {
        "data": traces,
        "layout": layout(
            meta={"unit": metric.unit, "lengths": lengths, "abreast": ABREAST, "step": STEP},
            xaxis=axis(type="log", range=scales.log_range(lengths), title={"text": LENGTH, "standoff": 6},
                       **ticks(positions, texts)),
            yaxis=axis(type="log", range=scales.log_range([*values, *table["low"].dropna(), *table["high"].dropna()]),
                       domain=[0, top], **ticks(*scales.log_ticks(values, metric.unit))),
            yaxis2=axis(domain=[min(top + 0.02, 0.99), 1], range=[rows - 0.5, -0.5], showgrid=False,
                        showticklabels=False, fixedrange=True),
        ),
    }  # fmt: skip


def _measured(mine: pd.DataFrame, lengths: list[int], style: Style) -> dict[str, Any]:
    measured = mine[mine["kind"] == "measured"].drop_duplicates("seq_len", keep="last").set_index("seq_len")
    if measured.empty:
        return {}
    at = [length if length in measured.index else None for length in lengths]  # None breaks the line

    def column(name: str) -> list[Any]:
        return [None if length is None else measured.at[length, name] for length in at]

    value, low, high = (column(name) for name in ("value", "low", "high"))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": lengths,
        "y": value,
        "text": [None if text is None else hover(text) for text in column("hover")],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [None if v is None else h - v for v, h in zip(value, high, strict=True)],
            "arrayminus": [None if v is None else v - b for v, b in zip(value, low, strict=True)],
            "thickness": 1,
            "width": 2,
            "color": style.color,
        },
        "line": {"color": style.color, "width": style.width, "dash": style.dash},
        "marker": {"color": style.color, "symbol": style.marker, "size": style.size},
        "connectgaps": False,
        "meta": {"role": "measured"},
    }


def _forecast(mine: pd.DataFrame, style: Style) -> dict[str, Any]:
    steps = forecast_path(mine)
    if not steps:
        return {}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [step["seq_len"] if step else None for step in steps],
        "y": [step["value"] if step else None for step in steps],
        "text": [hover(step["hover"]) if step else None for step in steps],
        "line": {"color": style.color, "width": 1, "dash": "dot"},
        "marker": {
            "color": style.color,
            "symbol": f"{style.marker}-open",
            "size": [8 if step and step["kind"] == "forecast" else 0 for step in steps],
        },
        "connectgaps": False,
        "meta": {"role": "forecast"},
    }


def _missing(mine: pd.DataFrame, style: Style, places: Mapping[tuple[str, int], tuple[float, int]]) -> dict[str, Any]:
    missing = mine[mine["kind"] == "missing"]
    if missing.empty:
        return {}
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [int(length) for length in missing["seq_len"]],
        "y": [
            places[str(series), int(length)][1]
            for series, length in missing[["series", "seq_len"]].itertuples(index=False)
        ],
        "yaxis": "y2",
        "text": [hover(text) for text in missing["hover"]],
        "marker": {
            "color": style.color,
            "symbol": [status_of(status).symbol for status in missing["status"]],
            "size": 6,
            "line": {"color": style.color, "width": 1.5},
        },
        "cliponaxis": False,
        "meta": {"role": "missing"},
    }


def forecast_path(mine: pd.DataFrame) -> list[dict[str, Any] | None]:
    """The dotted line through the forecasts: it starts and ends at measured neighbours; None lifts the pen."""
    drawn = records(mine[mine["kind"] != "missing"].sort_values("seq_len"))
    steps: list[dict[str, Any] | None] = []
    for index, point in enumerate(drawn):
        beside = [drawn[i] for i in (index - 1, index + 1) if 0 <= i < len(drawn)]
        if point["kind"] == "forecast" or any(other["kind"] == "forecast" for other in beside):
            steps.append(point)
        elif steps and steps[-1] is not None:
            steps.append(None)
    path: list[dict[str, Any] | None] = []
    for before, step in zip([None, *steps], steps, strict=False):
        if before and step and before["kind"] == step["kind"] == "measured":
            path.append(None)
        path.append(step)
    return path


def static(
    table: pd.DataFrame,
    metric: Metric,
    styles: Mapping[str, Style],
    shown: set[str] | None = None,
    legend: bool = False,
) -> Figure:
    """The same chart on paper; ``shown`` limits it to these series."""
    with canvas.style():
        if shown is not None:
            table = table[table["series"].isin(shown)]
        places = stacks(table)
        rows = 1 + max((row for _, row in places.values()), default=-1)
        chart = canvas.figure(6.4 if legend else 4.4, 3.6)
        ratios = [max(0.1, 0.045 * rows), 1] if rows else [0.02, 1]
        strip, axes = chart.subplots(2, 1, sharex=True, height_ratios=ratios)
        strip.axis("off")
        strip.set_ylim(rows - 0.4, -0.6)
        for series, mine in table.groupby("series", sort=True):
            style = styles[str(series)]
            _draw_series(axes, mine, str(series), style)
            for point in records(mine[mine["kind"] == "missing"]):
                marker = status_of(point["status"]).marker
                shift, row = places[str(series), int(point["seq_len"])]
                strip.plot(point["seq_len"] * 2 ** (STEP * shift), row, marker=marker, color=style.color,
                           markerfacecolor="none", markersize=4.0, clip_on=False)  # fmt: skip
        lengths = [int(length) for length in table["seq_len"].unique()] or [1]
        canvas.bare_log(axes, "x", *scales.token_ticks(lengths, most=8))
        canvas.bare_log(axes, "y", *scales.log_ticks(table["value"].dropna(), metric.unit))
        axes.set_xlim(*(10**edge for edge in scales.log_range(lengths)))
        axes.set_xlabel(LENGTH)
        if legend:
            strip.set_title(f"{metric.title}: {metric.note}", fontsize=9, loc="left")
        if legend and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
        return chart


def _draw_series(axes: Any, mine: pd.DataFrame, series: str, style: Style) -> None:
    measured = mine[mine["kind"] == "measured"].drop_duplicates("seq_len", keep="last").set_index("seq_len")
    if not measured.empty:
        lengths = sorted(mine["seq_len"].unique())
        drawn = measured.reindex(lengths)  # NaN breaks the line
        axes.errorbar(
            lengths, drawn["value"], yerr=[drawn["value"] - drawn["low"], drawn["high"] - drawn["value"]],
            color=style.color, marker=MPL_MARKERS[style.marker], linestyle=MPL_DASHES[style.dash],
            elinewidth=0.8,
            linewidth=0.8 * style.width,
            markersize=0.7 * style.size, label=series,
        )  # fmt: skip
    path = forecast_path(mine)
    axes.plot([p["seq_len"] if p else math.nan for p in path], [p["value"] if p else math.nan for p in path],
              color=style.color, linestyle=":", linewidth=0.9)  # fmt: skip
    hollow = mine[mine["kind"] == "forecast"]
    axes.plot(hollow["seq_len"], hollow["value"], linestyle="none", marker=MPL_MARKERS[style.marker],
              color=style.color, markerfacecolor="none", label="_forecast")  # fmt: skip
