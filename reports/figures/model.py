"""One series against its formula: latency and the scaled formula, the residual, the slope between neighbours."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.printable import printable
from ctxbench.analysis.slopes import model_table
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.overview import LENGTH
from ctxbench.reports.figures.plotly_json import INK, axis, hover, layout, ticks
from ctxbench.reports.palette import MPL_MARKERS, Style
from ctxbench.units import format_tokens

MODEL_DASH = "4px,3px"


def data(series: pd.DataFrame) -> pd.DataFrame:
    """Measurements, model, residuals and slopes; see :func:`ctxbench.analysis.slopes.model_table`."""
    return model_table(series)


def interactive(table: pd.DataFrame, style: Style) -> dict[str, Any]:
    """Plotly JSON of the three panels, which share the axis of lengths."""
    measured = table[table["latency_s"].notna()]
    modelled = table[table["model_s"].notna()]
    steps = table[table["slope"].notna()]
    lengths = [int(length) for length in table["seq_len"]]
    marker = {"color": style.color, "symbol": style.marker, "size": 7}
    line = {"color": INK, "width": 1.5, "dash": MODEL_DASH}
    traces: list[dict[str, Any]] = [
        _trace(modelled["seq_len"], modelled["model_s"], "y", "lines", _model_texts(modelled), line=line, ink=True),
        _trace(measured["seq_len"], measured["latency_s"], "y", "markers", _measured_texts(measured), marker=marker,
               error_y=_bars(measured["latency_s"], measured["latency_low_s"], measured["latency_high_s"], style)),
        _trace(measured["seq_len"], 100 * measured["residual"], "y2", "markers",
               [f"{format_tokens(t)}: {100 * r:+.1f} % of the model"
                for t, r in zip(measured["seq_len"], measured["residual"], strict=True)], marker=marker),
        _trace(steps["slope_at"], steps["slope_formula"], "y3", "lines+markers",
               [f"slope by formula {value:.2f}" for value in steps["slope_formula"]], line=line,
               marker={"color": INK, "symbol": "line-ew-open", "size": 9, "line": {"width": 1.5}}, ink=True),
        _trace(steps["slope_at"], steps["slope"], "y3", "markers",
               [f"slope measured {s:.2f} (bounds {low:.2f} to {high:.2f})" for s, low, high
                in zip(steps["slope"], steps["slope_low"], steps["slope_high"], strict=True)], marker=marker,
               error_y=_bars(steps["slope"], steps["slope_low"], steps["slope_high"], style)),
    ]  # fmt: skip
    ends = [*measured["latency_low_s"], *measured["latency_high_s"]]
    values = [*measured["latency_s"], *modelled["model_s"], *ends]
    texts = scales.token_ticks(lengths, most=8)
    return {
        "data": [trace for trace in traces if trace["x"]],
        "layout": layout(
            annotations=[_label("residual: measured / line \u2212 1", 0.425), _label("local slope", 0.235)],
            xaxis=axis(type="log", range=scales.log_range(lengths), anchor="y3",
                       title={"text": LENGTH, "standoff": 6}, **ticks(*texts)),
            yaxis=axis(type="log", domain=[0.48, 1], range=scales.log_range(values),
                       **ticks(*scales.log_ticks(values, "s", most=5))),
            yaxis2=axis(domain=[0.27, 0.4], range=residual_range(table), **ticks(*residual_ticks(table))),
            yaxis3=axis(domain=[0, 0.21], range=slope_range(table), nticks=4),
        ),
    }  # fmt: skip


def _label(text: str, height: float) -> dict[str, Any]:
    """The name of a panel, above its left end."""
    return {"text": text, "xref": "paper", "yref": "paper", "x": 0, "y": height, "xanchor": "left", "yanchor": "middle",
            "showarrow": False, "font": {"size": 11}}  # fmt: skip


def residual_range(table: pd.DataFrame) -> list[float]:
    """Percent, symmetric around zero, wide enough for every residual and never narrower than 10 %."""
    largest = 100 * table["residual"].abs().max()
    edge = 1.2 * max(10.0, 0.0 if math.isnan(largest) else largest)
    return [-edge, edge]


def residual_ticks(table: pd.DataFrame) -> tuple[list[float], list[str]]:
    """Zero, and a round number on both sides of it."""
    edge = residual_range(table)[1]
    step = max(digit * 10**power for power in range(1, 7) for digit in (1, 2, 5) if digit * 10**power <= edge)
    return [-step, 0.0, step], [f"\u2212{step} %", "0 %", f"{step} %"]


def slope_range(table: pd.DataFrame) -> list[float]:
    """From 0 to 2 at least; bounds of single steps may be cut off, values never."""
    values = [*table["slope"].dropna(), *table["slope_formula"].dropna()]
    return [min([0.0, *values]) - 0.15, max([2.0, *values]) + 0.25]


def _trace(x: Any, y: Any, yaxis: str, mode: str, texts: list[str], ink: bool = False, **looks: Any) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": mode, "x": [float(value) for value in x],
        "y": [None if pd.isna(value) else float(value) for value in y], "yaxis": yaxis,
        "text": [hover(text) for text in texts], "hovertemplate": "%{text}<extra></extra>",
        "meta": {"role": "ink" if ink else "data"}, **looks,
    }  # fmt: skip


def _bars(value: pd.Series, low: pd.Series, high: pd.Series, style: Style) -> dict[str, Any]:
    return {"type": "data", "symmetric": False, "array": list((high - value).fillna(0)),
            "arrayminus": list((value - low).fillna(0)), "thickness": 1, "width": 2, "color": style.color}  # fmt: skip


def _measured_texts(measured: pd.DataFrame) -> list[str]:
    columns = ("seq_len", "latency_s", "latency_low_s", "latency_high_s")
    return [f"{format_tokens(int(length))}: {scales.text(value, 's')}\n"
            f"interval {scales.text(low, 's')} to {scales.text(high, 's')}"
            for length, value, low, high in measured[list(columns)].itertuples(index=False)]  # fmt: skip


def _model_texts(modelled: pd.DataFrame) -> list[str]:
    return [f"{format_tokens(int(length))}: {scales.text(value, 's')} by the scaled formula"
            for length, value in modelled[["seq_len", "model_s"]].itertuples(index=False)]  # fmt: skip


def static(table: pd.DataFrame, style: Style, title: str = "") -> Figure:
    """The three panels on paper."""
    with canvas.style():
        chart = canvas.figure(4.0, 4.2)
        latency, residual, slope = chart.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1.3])
        look = {"color": style.color, "marker": MPL_MARKERS[style.marker], "linestyle": "none"}
        line = {"color": canvas.INK, "linewidth": 1.1, "linestyle": (0, (4, 3))}
        measured, steps = table[table["latency_s"].notna()], table[table["slope"].notna()]
        latency.plot(table["seq_len"], table["model_s"], **line)
        bars = [(measured["latency_s"] - measured["latency_low_s"]).fillna(0),
                (measured["latency_high_s"] - measured["latency_s"]).fillna(0)]  # fmt: skip
        latency.errorbar(measured["seq_len"], measured["latency_s"], yerr=bars, elinewidth=0.8, **look)
        residual.axhline(0, color=canvas.GRID, linewidth=0.8)
        residual.plot(measured["seq_len"], 100 * measured["residual"], **look)
        slope.plot(steps["slope_at"], steps["slope_formula"], **line)
        slope.plot(steps["slope_at"], steps["slope"], **look)
        values = [*measured["latency_s"], *table["model_s"].dropna()]
        lengths = [int(length) for length in table["seq_len"]]
        canvas.bare_log(latency, "y", *scales.log_ticks(values, "s", most=5))
        canvas.bare_log(slope, "x", *scales.token_ticks(lengths, most=8))
        slope.set_xlim(*(10**edge for edge in scales.log_range(lengths)))
        residual.set_ylim(residual_range(table))
        slope.set_ylim(slope_range(table))
        latency.set_ylabel("time per call")
        residual.set_ylabel("residual (%)")
        slope.set_ylabel("slope")
        slope.set_xlabel(LENGTH)
        latency.set_title(printable(title), fontsize=9, loc="left")
        chart.align_ylabels()
        return chart
