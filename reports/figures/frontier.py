"""The largest length below a memory limit: by formula as a line, and how far measurements reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.pareto import Frontier
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.overview import LENGTH
from ctxbench.reports.figures.plotly_json import axis, layout, scatter, ticks
from ctxbench.reports.palette import MPL_DASHES, MPL_MARKERS, Style
from ctxbench.units import format_tokens

LIMIT = "memory limit of one process"
COLUMNS = ["series", "label", "limit", "by_formula", "measured", "exceeded", "consistent", "hover"]


def data(found: Sequence[tuple[str, Frontier]]) -> pd.DataFrame:
    """One line a series and limit, lengths in tokens, absent ones NaN; ``found`` pairs series with what is known."""
    lines = [{**{name: getattr(each, name) for name in COLUMNS[1:-1]}, "series": series, "hover": _text(each)}
             for series, each in found]  # fmt: skip
    return pd.DataFrame(lines, columns=COLUMNS).astype({"by_formula": float, "measured": float, "exceeded": float})


def _text(each: Frontier) -> str:
    by = (
        "unknown" if each.by_formula is None else about(each.by_formula) if each.by_formula else "not even the shortest"
    )
    measured = f"measured up to {format_tokens(each.measured)}" if each.measured else "no measured length fits"
    more = f", exceeded at {format_tokens(each.exceeded)}" if each.exceeded else ""
    doubt = ["measurements contradict the formula"] if each.consistent is False else []
    head = f"{each.label} in {scales.text(each.limit, 'B')}"
    return "\n".join([head, f"by formula: {by}", measured + more, *doubt])


def about(length: float) -> str:
    """A length to two digits: ``46k``, ``1.2m``."""
    unit, letter = (2**20, "m") if length >= 2**20 else (2**10, "k") if length >= 2**10 else (1, "")
    value = length / unit
    return f"{value:.0f}{letter}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") + letter


def interactive(table: pd.DataFrame, styles: Mapping[str, Style], shown: set[str] | None = None) -> dict[str, Any]:
    """Plotly JSON of lengths by formula; a cross is what ran out of memory or stood above the limit."""
    traces = []
    for series, mine in table.sort_values("limit").groupby("series", sort=True):
        style, visible = styles[str(series)], shown is None or series in shown
        some = mine[mine["by_formula"] > 0]
        for _, one in some.groupby("label", sort=True):
            traces.append(scatter(one["limit"], one["by_formula"], one["hover"], style=style, series=str(series),
                                  visible=visible))  # fmt: skip
    lengths, limits = [*table.loc[table["by_formula"] > 0, "by_formula"]] or [1.0], sorted(set(table["limit"]))
    return {
        "data": traces,
        "layout": layout(
            xaxis=axis(type="log", range=scales.log_range(limits), title={"text": LIMIT, "standoff": 6},
                       **ticks(limits[::2], [scales.text(limit, "B") for limit in limits[::2]])),
            yaxis=axis(type="log", range=scales.log_range(lengths), title={"text": LENGTH, "standoff": 4},
                       **ticks(*token_scale(lengths))),
        ),
    }  # fmt: skip


def token_scale(lengths: Sequence[float]) -> tuple[list[int], list[str]]:
    """Powers of two for an axis of lengths."""
    low, high = min(lengths), max(lengths)
    inside = [2**power for power in range(64) if low * 0.999 <= 2**power <= high * 1.001]
    return scales.token_ticks(inside or [round(low)], most=8)


def static(
    table: pd.DataFrame, styles: Mapping[str, Style], shown: set[str] | None = None, legend: bool = False
) -> Figure:
    """The same chart on paper; ``shown`` limits it to these series."""
    if shown is not None:
        table = table[table["series"].isin(shown)]
    table = table[table["by_formula"] > 0]
    with canvas.style():
        chart = canvas.figure(8.4 if legend else 7.0, 3.6)
        axes = chart.subplots()
        for series, mine in table.sort_values("limit").groupby("series", sort=True):
            style = styles[str(series)]
            for index, (_, one) in enumerate(mine.groupby("label", sort=True)):
                axes.plot(one["limit"], one["by_formula"], color=style.color, marker=MPL_MARKERS[style.marker],
                          linestyle=MPL_DASHES[style.dash], label="_" if index else str(series))  # fmt: skip
        limits = sorted(set(table["limit"])) or [2**30]
        lengths = [*table["by_formula"]] or [1.0]
        canvas.bare_log(axes, "x", limits, [scales.text(limit, "B") for limit in limits])
        canvas.bare_log(axes, "y", *token_scale(lengths))
        axes.set_xlabel(LIMIT)
        axes.set_ylabel(LENGTH)
        canvas.legend(axes, legend)
        return chart
