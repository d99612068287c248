"""Several runs of one machine: what each cell took from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.frame import MEASURED, records
from ctxbench.analysis.printable import printable
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.plotly_json import axis, hover, layout, scatter, ticks
from ctxbench.reports.palette import MPL_DASHES, MPL_MARKERS, Style
from ctxbench.units import counted, format_tokens

COLUMNS = ["series", "seq_len", "order", "run", "value", "low", "high", "hover"]
TIMES = "time in units of the first run"


def data(frame: pd.DataFrame, order: Iterable[str]) -> pd.DataFrame:
    """Times of every cell that at least two of the runs measured, in seconds and over that of its first run.

    Args:
        frame: rows of all runs, see ``analysis.frame.to_frame``.
        order: names of the runs by the time they were made.
    """
    places = {name: index for index, name in enumerate(order)}
    rows = frame[frame["status"].isin(MEASURED) & (frame["latency_s"] > 0) & frame["run"].isin(places)]
    often = rows.groupby("cell")["run"].transform("nunique") > 1
    found = [
        {"series": row["series"], "seq_len": int(row["seq_len"]), "order": places[row["run"]], "run": row["run"],
         "value": row["latency_s"], "low": row["latency_low_s"], "high": row["latency_high_s"], "hover": _text(row)}
        for row in records(rows[often])
    ]  # fmt: skip
    table = pd.DataFrame(found, columns=COLUMNS).sort_values(["series", "seq_len", "order"], ignore_index=True)
    first = table.groupby(["series", "seq_len"])["value"].transform("first")
    return table.assign(**{f"{name}_ratio": table[name] / first for name in ("value", "low", "high")})


def _text(row: Mapping[str, Any]) -> str:
    low, high = (scales.text(row[f"latency_{end}_s"], "s") for end in ("low", "high"))
    return "\n".join((
        f"{row['series']} at {format_tokens(int(row['seq_len']))} tokens", f"in {row['run']}, {row['started_at'][:16]}",
        f"{scales.text(row['latency_s'], 's')}, interval {low} to {high}", counted(int(row["n_processes"]), "process"),
    ))  # fmt: skip


def interactive(
    table: pd.DataFrame, order: Mapping[str, str], styles: Mapping[str, Style], shown: set[str] | None = None
) -> dict[str, Any]:
    """Plotly JSON of one length: a line a series over the runs; ``order`` has the text of each run's tick."""
    traces = [
        scatter(mine["order"], mine["value_ratio"], mine["hover"], style=styles[str(series)], series=str(series),
                visible=shown is None or series in shown, y_bounds=(mine["low_ratio"], mine["high_ratio"]))
        for series, mine in table.groupby("series", sort=True)
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": layout(
            xaxis=axis(range=[-0.3, len(order) - 0.7], title={"text": "run, the oldest first", "standoff": 6},
                       **ticks(list(range(len(order))), [hover(shortened(text)) for text in order.values()])),
            yaxis=axis(type="log", range=scales.log_range(_ratios(table)),
                       **ticks(*scales.log_ticks(_ratios(table), "x"))),
        ),
    }  # fmt: skip


def _ratios(table: pd.DataFrame) -> list[float]:
    return [*table["low_ratio"], *table["high_ratio"], 0.95, 1.05]


def shortened(name: str) -> str:
    """The name of a run as a tick: its start tells them apart."""
    return name if len(name) <= 18 else name[:16].rstrip("-_ ") + " \u2026"


def static(
    table: pd.DataFrame,
    order: Mapping[str, str],
    styles: Mapping[str, Style],
    shown: set[str] | None = None,
    legend: bool = False,
) -> Figure:
    """The same chart on paper; ``shown`` limits it to these series."""
    if shown is not None:
        table = table[table["series"].isin(shown)]
    with canvas.style():
        chart = canvas.figure(8.4 if legend else 7.0, 3.4)
        axes = chart.subplots()
        for series, mine in table.groupby("series", sort=True):
            style = styles[str(series)]
            bars = [mine["value_ratio"] - mine["low_ratio"], mine["high_ratio"] - mine["value_ratio"]]
            axes.errorbar(mine["order"], mine["value_ratio"], yerr=bars, color=style.color, label=str(series),
                          marker=MPL_MARKERS[style.marker], linestyle=MPL_DASHES[style.dash], elinewidth=0.8,
                          linewidth=0.8 * style.width, markersize=0.7 * style.size)  # fmt: skip
        canvas.bare_log(axes, "y", *scales.log_ticks(_ratios(table), "x"))
        axes.set_ylim(*(10**edge for edge in scales.log_range(_ratios(table))))
        axes.set_ylabel(TIMES)
        axes.set_xticks(range(len(order)), [printable(shortened(text)) for text in order.values()])
        axes.set_xlim(-0.3, len(order) - 0.7)
        axes.set_xlabel("run, the oldest first")
        canvas.legend(axes, legend)
        return chart
