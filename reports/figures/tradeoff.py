"""Time against peak memory at one length: who is on the front that nobody beats in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.pareto import DISTURBED, DOMINATED, FRONT, Point
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.plotly_json import axis, hover, layout, note, scatter, ticks
from ctxbench.reports.palette import MPL_MARKERS, Style
from ctxbench.units import format_tokens

TIME, PEAK = "time per call", "peak memory above weights and inputs"
COLUMNS = ["series", "label", "seq_len", "latency_s", "low", "high", "peak_bytes", "verdict", "by", "hover"]


def data(points: Sequence[Point], series: Callable[[str], str]) -> pd.DataFrame:
    """The points of one setting and length; ``series`` names the line of a chart that a cell belongs to."""
    found = [{**{name: getattr(point, name) for name in COLUMNS[1:-1]}, "series": series(point.cell),
              "hover": _text(point)} for point in points]  # fmt: skip
    return pd.DataFrame(found, columns=COLUMNS)


def _text(point: Point) -> str:
    verdict = {
        FRONT: "on the front: nobody is better in both",
        DOMINATED: f"beaten in both by {point.by}",
        DISTURBED: "other work ran beside it: not judged",
    }.get(point.verdict, f"perhaps beaten by {point.by}: the intervals overlap")
    low, high = scales.text(point.low, "s"), scales.text(point.high, "s")
    return "\n".join((
        f"{point.label} at {format_tokens(point.seq_len)} tokens",
        f"{scales.text(point.latency_s, 's')}, interval {low} to {high}",
        f"{scales.text(point.peak_bytes, 'B')} at the peak (allocator)",
        verdict,
    ))  # fmt: skip


def front(table: pd.DataFrame) -> tuple[list[float], list[float]]:
    """The corners of the front by rising time: straight on, then down."""
    on = table[table["verdict"] == FRONT].sort_values(["latency_s", "peak_bytes"])
    x: list[float] = []
    y: list[float] = []
    for time, peak in zip(on["latency_s"], on["peak_bytes"], strict=True):
        if y and peak >= y[-1]:
            continue
        if y:
            x.append(float(time))
            y.append(y[-1])
        x.append(float(time))
        y.append(float(peak))
    return x, y


def interactive(table: pd.DataFrame, styles: Mapping[str, Style], shown: set[str] | None = None) -> dict[str, Any]:
    """Plotly JSON; points on the front are filled and named, the others hollow.

    The front is that of all impls, so its points stay whatever a reader has chosen to see.
    """
    x, y = front(table)
    traces = [scatter(x, y, [""] * len(x), mode="lines", role="ink", line={"width": 1.2, "dash": "4px,3px"},
                      hoverinfo="skip")]  # fmt: skip
    for (series, on_front), mine in table.groupby(["series", table["verdict"] == FRONT], sort=True):
        ahead = bool(on_front)
        style, mine = styles[str(series)], mine.sort_values("latency_s")
        trace = scatter(
            mine["latency_s"], mine["peak_bytes"], mine["hover"], mode="markers", style=style, series=str(series),
            visible=ahead or shown is None or series in shown, x_bounds=(mine["low"], mine["high"]),
            symbols=[style.marker if ahead else f"{style.marker}-open"] * len(mine),
            sizes=[10 if ahead else 8] * len(mine),
        )  # fmt: skip
        trace["meta"] |= {"stays": True} if ahead else {}
        traces.append(trace)
    times, peaks = [*table["low"], *table["latency_s"], *table["high"]], [*table["peak_bytes"]]
    nothing = [] if len(table) else [{**note(0.5, 0.5, "nothing was measured at this length"), "xref": "paper",
                                      "yref": "paper", "xanchor": "center"}]  # fmt: skip
    return {
        "data": traces,
        "layout": layout(
            annotations=nothing or [
                note(time, peak, hover(_short(label)), **_beside(index, time, times)) | {"name": series}
                for index, (series, label, time, peak) in enumerate(named(table))
            ],
            xaxis=axis(type="log", range=scales.log_range(times, 0.1), title={"text": TIME, "standoff": 6},
                       **ticks(*scales.log_ticks(times, "s"))),
            yaxis=axis(type="log", range=scales.log_range(peaks, 0.1), **ticks(*scales.log_ticks(peaks, "B"))),
        ),
    }  # fmt: skip


def named(table: pd.DataFrame) -> list[tuple[str, str, float, float]]:
    """Series, label, time and peak of the corners of the front."""
    on = table[table["verdict"] == FRONT].sort_values(["latency_s", "peak_bytes"])
    columns = ["series", "label", "latency_s", "peak_bytes"]
    return [(str(s), str(label), float(t), float(p)) for s, label, t, p in on[columns].itertuples(index=False)]


def _beside(index: int, time: float, times: Sequence[float]) -> dict[str, Any]:
    """Neighbours on the front have their names above and below in turn, and towards the middle of the chart."""
    right = time**2 > min(times) * max(times)
    return {"yshift": -13 if index % 2 else 13, "xshift": -8 if right else 8, "xanchor": "right" if right else "left"}


def _short(label: str) -> str:
    label = label.replace(" (memory ", " (")
    return label if len(label) <= 34 else label[:32].rstrip() + " \u2026"


def static(
    table: pd.DataFrame, styles: Mapping[str, Style], shown: set[str] | None = None, legend: bool = False
) -> Figure:
    """The same chart on paper; ``shown`` limits it to these series."""
    with canvas.style():
        chart = canvas.figure(8.4 if legend else 7.0, 3.8)
        axes = chart.subplots()
        axes.plot(*front(table), color=canvas.INK, linestyle=(0, (4, 3)), linewidth=1.0, label="_front")
        if shown is not None:
            table = table[table["series"].isin(shown)]
        for series, mine in table.groupby("series", sort=True):
            style = styles[str(series)]
            for on_front, face in ((True, style.color), (False, "none")):
                some = mine[(mine["verdict"] == FRONT) == on_front]
                axes.plot(some["latency_s"], some["peak_bytes"], linestyle="none", marker=MPL_MARKERS[style.marker],
                          color=style.color, markerfacecolor=face, markersize=6,
                          label=str(series) if on_front == (mine["verdict"] == FRONT).any() else "_")  # fmt: skip
        times, peaks = [*table["latency_s"]] or [1.0], [*table["peak_bytes"]] or [1.0]
        for index, (_, label, time, peak) in enumerate(named(table)):
            place = _beside(index, time, times)
            axes.annotate(_short(label), (time, peak), xytext=(0.6 * place["xshift"], 0.5 * place["yshift"]),
                          textcoords="offset points", fontsize=8, ha=place["xanchor"], va="center")  # fmt: skip
        canvas.bare_log(axes, "x", *scales.log_ticks(times, "s"))
        canvas.bare_log(axes, "y", *scales.log_ticks(peaks, "B"))
        axes.set_xlim(*(10**edge for edge in scales.log_range(times, 0.1)))
        axes.set_ylim(*(10**edge for edge in scales.log_range(peaks, 0.1)))
        axes.set_xlabel(TIME)
        axes.set_ylabel("peak memory")
        canvas.legend(axes, legend)
        return chart
