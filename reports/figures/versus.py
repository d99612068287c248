"""Two runs of the same cells: their curves over each other, and the ratio of the second to the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.compare import SAME, Compared, Verdict
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.overview import LENGTH
from ctxbench.reports.figures.plotly_json import axis, layout, scatter, ticks
from ctxbench.reports.palette import MPL_DASHES, MPL_MARKERS, Style
from ctxbench.units import counted, format_tokens

COLUMNS = ["series", "label", "seq_len", "a_s", "b_s", "ratio", "low", "high", "verdict", "hover"]
MARKS = {
    Verdict.FASTER: "\u25bc", Verdict.SLOWER: "\u25b2", Verdict.SAME: "=", Verdict.UNCLEAR: "?",
    Verdict.INVALID: "\u2715",
}  # fmt: skip
B_DASH = "3px,3px"


def data(cells: Sequence[Compared], series: Callable[[str], str]) -> pd.DataFrame:
    """One line a cell that both runs measured; ``series`` names the line of a chart that a cell belongs to."""
    found = [
        {"series": series(cell.cell_b), "label": label(cell), "seq_len": cell.seq_len, "a_s": cell.a_s, "b_s": cell.b_s,
         "ratio": cell.ratio, "low": cell.low, "high": cell.high, "verdict": str(cell.verdict), "hover": _text(cell)}
        for cell in cells if cell.a_s is not None and cell.ratio is not None
    ]  # fmt: skip
    numbers = dict.fromkeys(("a_s", "b_s", "ratio", "low", "high"), float)
    return pd.DataFrame(found, columns=COLUMNS).astype(numbers)


def label(cell: Compared) -> str:
    """``method / impl``, with the memory size where there is one."""
    return f"{cell.method} / {cell.impl}" + ("" if cell.memory is None else f" (memory {format_tokens(cell.memory)})")


def ratio_text(cell: Compared) -> str:
    """The ratio with its interval, and how sure that is."""
    if cell.ratio is None:
        return ""
    if cell.low is None or cell.high is None:
        return f"{cell.ratio:.3g} \u00d7"
    return f"{cell.ratio:.3g} \u00d7 ({cell.low:.3g} to {cell.high:.3g})"


def _text(cell: Compared) -> str:
    assert cell.a_s is not None
    assert cell.b_s is not None
    lines = [
        f"{label(cell)} at {format_tokens(cell.seq_len)} tokens",
        f"A {scales.text(cell.a_s, 's')}, B {scales.text(cell.b_s, 's')}",
        f"B / A {ratio_text(cell)}",
        f"{cell.n_a} and {counted(cell.n_b, 'process')}",
        f"{cell.verdict}" + (f": {cell.reason}" if cell.reason else ""),
    ]
    return "\n".join(lines)


def curves(table: pd.DataFrame, styles: Mapping[str, Style], shown: set[str] | None = None) -> dict[str, Any]:
    """Plotly JSON of the times: A in the series' own line, B over it with hollow markers on short dashes."""
    traces = []
    for (series, _), mine in table.sort_values("seq_len").groupby(["series", "label"], sort=True):
        style, visible = styles[str(series)], shown is None or series in shown
        traces.append(scatter(mine["seq_len"], mine["a_s"], mine["hover"], style=style, series=str(series),
                              visible=visible))  # fmt: skip
        traces.append(scatter(
            mine["seq_len"], mine["b_s"], mine["hover"], style=style, series=str(series), visible=visible,
            symbols=[f"{style.marker}-open"] * len(mine), line={"color": style.color, "width": 1.4, "dash": B_DASH},
        ))  # fmt: skip
    return {"data": traces, "layout": _layout(table, [*table["a_s"], *table["b_s"]], "s")}


def interactive(table: pd.DataFrame, styles: Mapping[str, Style], shown: set[str] | None = None) -> dict[str, Any]:
    """Plotly JSON of the ratios with their intervals; the band is what nobody needs to know."""
    lengths = sorted(set(table["seq_len"])) or [1]
    ends = [10**edge for edge in scales.log_range(lengths)]
    traces = [
        scatter(ends, [edge] * 2, [""] * 2, mode="lines", role="ink", hoverinfo="skip",
                line={"width": width, "dash": "3px,3px" if width < 1 else "solid"})
        for edge, width in ((1 / (1 + SAME), 0.8), (1.0, 1.2), (1 + SAME, 0.8))
    ]  # fmt: skip
    for (series, _), mine in table.sort_values("seq_len").groupby(["series", "label"], sort=True):
        style = styles[str(series)]
        sure = (str(Verdict.FASTER), str(Verdict.SLOWER))
        symbols = [style.marker if verdict in sure else f"{style.marker}-open" for verdict in mine["verdict"]]
        traces.append(scatter(
            mine["seq_len"], mine["ratio"], mine["hover"], style=style, series=str(series), symbols=symbols,
            visible=shown is None or series in shown, y_bounds=(mine["low"], mine["high"]),
        ))  # fmt: skip
    return {"data": traces, "layout": _layout(table, _ratios(table), "x")}


def _ratios(table: pd.DataFrame) -> list[float]:
    return [*table["ratio"], *table["low"].dropna(), *table["high"].dropna(), 0.9, 1.1]


def _layout(table: pd.DataFrame, values: list[float], unit: str) -> dict[str, Any]:
    lengths = sorted({int(length) for length in table["seq_len"]}) or [1]
    return layout(
        xaxis=axis(type="log", range=scales.log_range(lengths), title={"text": LENGTH, "standoff": 6},
                   **ticks(*scales.token_ticks(lengths, most=8))),
        yaxis=axis(type="log", range=scales.log_range(values), **ticks(*scales.log_ticks(values, unit))),
    )  # fmt: skip


def static(
    table: pd.DataFrame,
    styles: Mapping[str, Style],
    shown: set[str] | None = None,
    ratio: bool = True,
    legend: bool = False,
) -> Figure:
    """Ratios, or with ``ratio=False`` the times of both runs, on paper."""
    if shown is not None:
        table = table[table["series"].isin(shown)]
    with canvas.style():
        chart = canvas.figure(6.4 if legend else 4.4, 3.4)
        axes = chart.subplots()
        if ratio:
            axes.axhspan(1 / (1 + SAME), 1 + SAME, color=canvas.GRID, alpha=0.4, linewidth=0)
            axes.axhline(1.0, color=canvas.INK, linewidth=0.8)
        for (series, _), mine in table.sort_values("seq_len").groupby(["series", "label"], sort=True):
            style = styles[str(series)]
            look: dict[str, Any] = {
                "color": style.color,
                "marker": MPL_MARKERS[style.marker],
                "markersize": 0.7 * style.size,
            }
            if ratio:
                low, high = (mine["ratio"] - mine["low"]).fillna(0), (mine["high"] - mine["ratio"]).fillna(0)
                axes.errorbar(mine["seq_len"], mine["ratio"], yerr=[low, high], elinewidth=0.8, linewidth=1.0,
                              linestyle=MPL_DASHES[style.dash], label=str(series), **look)  # fmt: skip
                continue
            axes.plot(mine["seq_len"], mine["a_s"], linestyle=MPL_DASHES[style.dash], label=str(series), **look)
            axes.plot(mine["seq_len"], mine["b_s"], linestyle=(0, (2, 2)), markerfacecolor="none", linewidth=1.0,
                      label="_B", **look)  # fmt: skip
        values = _ratios(table) if ratio else [*table["a_s"], *table["b_s"]] or [1.0]
        lengths = sorted({int(length) for length in table["seq_len"]}) or [1]
        canvas.bare_log(axes, "x", *scales.token_ticks(lengths, most=8))
        canvas.bare_log(axes, "y", *scales.log_ticks(values, "x" if ratio else "s"))
        axes.set_ylim(*(10**edge for edge in scales.log_range(values)))
        axes.set_xlim(*(10**edge for edge in scales.log_range(lengths)))
        axes.set_xlabel(LENGTH)
        canvas.legend(axes, legend)
        return chart
