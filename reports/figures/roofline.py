"""Arithmetic intensity against attained FLOP/s, under the ceilings that were measured on the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.frame import MEASURED, records
from ctxbench.cost.roofline import Ceilings, least_bytes
from ctxbench.method import DTYPE_BYTES
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.plotly_json import axis, layout, note, scatter, ticks
from ctxbench.reports.palette import MPL_DASHES, MPL_MARKERS, Style
from ctxbench.units import format_tokens

INTENSITY = "intensity (FLOP per byte moved)"
COLUMNS = ["series", "seq_len", "dtype", "intensity", "least", "rate", "low", "high", "share", "hover"]


def data(frame: pd.DataFrame, ceilings: Ceilings | None) -> pd.DataFrame:
    """One line a measured row whose FLOPs and traffic are known.

    ``intensity`` takes the bytes that its operators read and wrote, one by one; ``least`` those that no program avoids
    (inputs, outputs, weights, state). ``share`` is the part of the roof at that intensity which was attained.
    """
    found = []
    for row in records(frame[frame["status"].isin(MEASURED) & (frame["latency_s"] > 0)]):
        work = next((float(row[name]) for name in ("flops_counted", "flops_formula") if _known(row[name])), None)
        if work is None or not _known(row["bytes_moved"]):
            continue
        intensity, rate = work / float(row["bytes_moved"]), work / row["latency_s"]
        roof = None if ceilings is None else min(ceilings.matmul(row["dtype"]), intensity * ceilings.bytes_per_s)
        point = {
            "series": row["series"], "seq_len": int(row["seq_len"]), "dtype": row["dtype"], "intensity": intensity,
            "least": max(intensity, work / least_of(row)), "rate": rate, "low": work / row["latency_high_s"],
            "high": work / row["latency_low_s"], "share": None if roof is None else rate / roof,
        }  # fmt: skip
        found.append({**point, "hover": _text(point)})
    table = pd.DataFrame(found, columns=COLUMNS)
    return table.astype(dict.fromkeys(("intensity", "least", "rate", "low", "high", "share"), float))


def _known(value: Any) -> bool:
    return not pd.isna(value) and value > 0


def least_of(row: Mapping[str, Any]) -> int:
    """Bytes no program avoids in this row's call."""
    parameters, state = (
        next((int(row[f"{name}_{kind}"]) for kind in ("measured", "formula") if _known(row[f"{name}_{kind}"])), 0)
        for name in ("parameters", "state")
    )
    tokens = int(row["batch_size"]) * (1 if row["mode"] == "decode" else int(row["seq_len"]))
    carried = state if row["mode"] == "decode" else 0
    return least_bytes(DTYPE_BYTES[row["dtype"]], tokens, int(row["d_model"]), parameters, carried)


def _text(point: Mapping[str, Any]) -> str:
    lines = [
        f"{point['series']} at {format_tokens(point['seq_len'])} tokens",
        f"{scales.text(point['rate'], 'FLOP/s')} at {point['intensity']:.3g} FLOP per byte",
        f"interval {scales.text(point['low'], 'FLOP/s')} to {scales.text(point['high'], 'FLOP/s')}",
        f"with the least possible traffic {point['least']:.3g} FLOP per byte",
    ]
    return "\n".join(lines + ([] if point["share"] is None else [f"{100 * point['share']:.3g} % of the roof there"]))


def roofs(table: pd.DataFrame, ceilings: Ceilings | None) -> list[tuple[str, list[float], list[float]]]:
    """A roof for every dtype of the table: its name, and three points from the slope over the ridge to the end."""
    if ceilings is None or table.empty:
        return []
    low, high = (10**edge for edge in scales.log_range([*table["intensity"], *table["least"]]))
    found = []
    for dtype in sorted(table["dtype"].unique()):
        peak = ceilings.matmul(dtype)
        ridge = peak / ceilings.bytes_per_s
        at = [low, max(ridge, low), max(high, 1.5 * ridge)]
        name = f"{dtype}: {scales.text(peak, 'FLOP/s')}, {scales.text(ceilings.bytes_per_s, 'B/s')}"
        found.append((name, at, [min(peak, x * ceilings.bytes_per_s) for x in at]))
    return found


def interactive(
    table: pd.DataFrame, styles: Mapping[str, Style], ceilings: Ceilings | None, shown: set[str] | None = None
) -> dict[str, Any]:
    """Plotly JSON: roofs in ink, a path through the lengths of every series; bars lead to the least traffic."""
    lines = roofs(table, ceilings)
    traces = [
        scatter(x, y, [f"measured ceiling of {name}"] * len(x), mode="lines", role="ink",
                line={"width": 1.5, "dash": "4px,3px"})
        for name, x, y in lines
    ]  # fmt: skip
    for series, mine in table.sort_values("seq_len").groupby("series", sort=True):
        style = styles[str(series)]
        size = [style.size * (0.7 + 0.6 * i / max(1, len(mine) - 1)) for i in range(len(mine))]
        traces.append(scatter(
            mine["intensity"], mine["rate"], mine["hover"], style=style, series=str(series), sizes=size,
            visible=shown is None or series in shown, y_bounds=(mine["low"], mine["high"]),
            x_bounds=(mine["intensity"], [*mine["intensity"].iloc[:-1], mine["least"].iloc[-1]]),
        ))  # fmt: skip
    rates = [*table["rate"], *(y for _, _, ys in lines for y in ys)]
    across = [*table["intensity"], *(x for _, xs, _ in lines for x in xs)]
    return {
        "data": traces,
        "layout": layout(
            annotations=[note(x[-1], y[-1], name, xanchor="right", yanchor="bottom") for name, x, y in lines],
            xaxis=axis(type="log", range=scales.log_range(across), title={"text": INTENSITY, "standoff": 6},
                       **ticks(*scales.log_ticks(across, ""))),
            yaxis=axis(type="log", range=scales.log_range(rates), **ticks(*scales.log_ticks(rates, "FLOP/s"))),
        ),
    }  # fmt: skip


def static(
    table: pd.DataFrame,
    styles: Mapping[str, Style],
    ceilings: Ceilings | None,
    shown: set[str] | None = None,
    legend: bool = False,
) -> Figure:
    """The same chart on paper; ``shown`` limits it to these series."""
    lines = roofs(table, ceilings)
    if shown is not None:
        table = table[table["series"].isin(shown)]
    with canvas.style():
        chart = canvas.figure(8.4 if legend else 7.0, 3.8)
        axes = chart.subplots()
        for name, x, y in lines:
            axes.plot(x, y, color=canvas.INK, linestyle=(0, (4, 3)), linewidth=1.2, label="_roof")
            axes.annotate(name, (x[-1], y[-1]), ha="right", va="bottom", xytext=(0, 3), textcoords="offset points")
        for series, mine in table.sort_values("seq_len").groupby("series", sort=True):
            style = styles[str(series)]
            axes.plot(mine["intensity"], mine["rate"], color=style.color, marker=MPL_MARKERS[style.marker],
                      linestyle=MPL_DASHES[style.dash], linewidth=0.8 * style.width, markersize=0.7 * style.size,
                      label=str(series))  # fmt: skip
        across = [*table["intensity"], *(x for _, xs, _ in lines for x in xs)] or [1.0]
        rates = [*table["rate"], *(y for _, _, ys in lines for y in ys)] or [1.0]
        canvas.bare_log(axes, "x", *scales.log_ticks(across, ""))
        canvas.bare_log(axes, "y", *scales.log_ticks(rates, "FLOP/s"))
        axes.set_xlim(*(10**edge for edge in scales.log_range(across)))
        axes.set_ylim(*(10**edge for edge in scales.log_range(rates)))
        axes.set_xlabel(INTENSITY)
        canvas.legend(axes, legend)
        return chart
