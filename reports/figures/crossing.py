"""Who is faster where: every method against one baseline along the length, and the fastest of all by memory size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ctxbench.analysis.crossover import FORECAST, Crossover
from ctxbench.analysis.printable import printable
from ctxbench.reports.figures import canvas, scales
from ctxbench.reports.figures.frontier import about, token_scale
from ctxbench.reports.figures.overview import LENGTH
from ctxbench.reports.figures.plotly_json import INK, axis, hover, layout, scatter, ticks
from ctxbench.reports.palette import MPL_MARKERS, Style
from ctxbench.units import format_tokens

Key = tuple[str, int | None]  # ``method / impl`` and memory size
COLUMNS = ["line", "series", "start", "end", "ours", "forecast", "crossing", "low", "high", "hover"]
WIDTH = 7


def data(found: Sequence[Crossover], baseline: Key, series: Callable[[Key], str]) -> pd.DataFrame:
    """Stretches of length, a line of the chart after the other.

    Args:
        found: crossings of the baseline with others, in the order they were found.
        baseline: whom all others are held against.
        series: the series whose look a curve has.

    A stretch starts and ends at a crossing or at the range of measurements; ``ours`` says that the other method is the
    faster one there. ``crossing`` is where a stretch starts, NaN at the first of a line, with its interval.
    """
    groups: dict[Key, list[Crossover]] = {}
    for each in found:
        ends = ((each.a, each.memory_a), (each.b, each.memory_b))
        if baseline in ends:
            groups.setdefault(ends[ends[0] == baseline], []).append(each)
    lines = [_stretches(other, each, series(other)) for other, each in groups.items()]
    lines.sort(key=lambda line: (-_share(line), line[0]["line"]))
    table = pd.DataFrame([stretch for line in lines for stretch in line], columns=COLUMNS)
    floats = dict.fromkeys(("start", "end", "crossing", "low", "high"), float)
    return table.astype({**floats, "ours": bool, "forecast": bool})


def _share(line: list[dict[str, Any]]) -> float:
    """The share of the range, in octaves, on which the method is the faster one."""
    spans = [(math.log(max(stretch["end"] / stretch["start"], 1.0)), stretch["ours"]) for stretch in line]
    return sum(span for span, ours in spans if ours) / max(sum(span for span, _ in spans), 1e-9)


def _stretches(other: Key, crossings: list[Crossover], series: str) -> list[dict[str, Any]]:
    crossings = sorted(crossings, key=lambda each: each.seq_len or 0.0)
    first, last = float(crossings[0].first), float(crossings[0].last)
    name = printable(label(other))
    line: dict[str, Any] = {
        "line": name,
        "series": series,
        "forecast": False,
        "crossing": None,
        "low": None,
        "high": None,
    }
    ours = (crossings[0].a, crossings[0].memory_a) == other
    text = f"{name}: {'faster' if ours else 'slower'} from {format_tokens(int(first))}"
    stretches = [{**line, "start": first, "ours": ours, "hover": text}]
    for each in crossings:
        if each.seq_len is None:
            continue
        ours = not ours
        stretches.append({
            **line, "start": each.seq_len, "ours": ours, "forecast": each.source == FORECAST,
            "crossing": each.seq_len, "low": each.low or (last if each.source == FORECAST else first),
            "high": each.high or max(last, each.seq_len), "hover": _text(name, each, ours),
        })  # fmt: skip
    for stretch, following in zip(stretches, [*stretches[1:], None], strict=True):
        stretch["end"] = following["start"] if following else max(last, stretch["start"] * 1.25)
    return stretches


def label(key: Key) -> str:
    """``method / impl (512)``, with the memory size where there is one."""
    return key[0] if key[1] is None else f"{key[0]} ({format_tokens(key[1])})"


def interval(each: Crossover) -> str:
    """The ends of the 90 % interval in words."""
    low = f"below {format_tokens(each.first)}" if each.low is None else about(each.low)
    if each.low is None and each.source == FORECAST:
        low = format_tokens(each.last)
    return f"{low} to {'beyond ' + format_tokens(each.last) if each.high is None else about(each.high)}"


def _text(name: str, each: Crossover, ours: bool) -> str:
    assert each.seq_len is not None
    kind = "by forecast, beyond the measured lengths" if each.source == FORECAST else "between measured lengths"
    chance = [] if each.chance is None else [f"{100 * each.chance:.0f} % of redrawn curves cross"]
    return "\n".join([f"{name}: {'faster' if ours else 'slower'} beyond {about(each.seq_len)} tokens",
                      f"90 % interval {interval(each)}", kind, *chance])  # fmt: skip


def interactive(table: pd.DataFrame, styles: Mapping[str, Style]) -> dict[str, Any]:
    """Plotly JSON: thick in the method's colour where it is faster, thin ink where the baseline is."""
    names = list(dict.fromkeys(table["line"]))
    rows = {name: len(names) - 1 - index for index, name in enumerate(names)}
    traces = []
    for forecast, dash in ((False, "solid"), (True, "dot")):
        theirs = table[~table["ours"] & (table["forecast"] == forecast)]
        traces.append(_lines(theirs, rows, {"color": INK, "width": 2, "dash": dash}, "ink"))
        for series, mine in table[table["ours"] & (table["forecast"] == forecast)].groupby("series", sort=True):
            look = {"color": styles[str(series)].color, "width": WIDTH, "dash": dash}
            traces.append(_lines(mine, rows, look, "data"))
    crossings = table[table["crossing"].notna()]
    for series, mine in crossings.groupby("series", sort=True):
        style, symbols = styles[str(series)], [styles[str(series)].marker] * len(mine)
        symbols = [f"{symbol}-open" if far else symbol for symbol, far in zip(symbols, mine["forecast"], strict=True)]
        trace = scatter(mine["crossing"], [rows[name] for name in mine["line"]], mine["hover"], mode="markers",
                        role="mark", style=style, symbols=symbols, x_bounds=(mine["low"], mine["high"]))  # fmt: skip
        trace["marker"] |= {"size": 12}
        trace["error_x"] |= {"thickness": 1.5, "width": 5}
        traces.append(trace)
    lengths = [*table["start"], *table["end"]] or [1.0]
    return {
        "data": [trace for trace in traces if trace["x"]],
        "layout": layout(
            meta={"rows": len(names)},
            margin={"l": 8, "r": 10, "t": 6, "b": 40, "pad": 4},
            xaxis=axis(type="log", range=scales.log_range(lengths, 0.03), title={"text": LENGTH, "standoff": 6},
                       **ticks(*token_scale(lengths))),
            yaxis=axis(range=[-0.6, len(names) - 0.4], showgrid=False, fixedrange=True,
                       **ticks([rows[name] for name in names], [hover(shortened(name)) for name in names])),
        ),
    }  # fmt: skip


def _lines(stretches: pd.DataFrame, rows: Mapping[str, int], look: dict[str, Any], role: str) -> dict[str, Any]:
    """Stretches of one look as one trace."""
    x, y = _gaps(stretches, rows)
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "text": [], "hoverinfo": "skip", "line": look,
            "meta": {"role": role, "series": ""}}  # fmt: skip


def _gaps(stretches: pd.DataFrame, rows: Mapping[str, int]) -> tuple[list[Any], list[Any]]:
    """Ends of all stretches, None between them."""
    x: list[Any] = []
    y: list[Any] = []
    for name, start, end in stretches[["line", "start", "end"]].itertuples(index=False):
        x += [float(start), float(end), None]
        y += [rows[name], rows[name], None]
    return x, y


def shortened(name: str) -> str:
    """A name that leaves room for the chart beside it."""
    return name if len(name) <= 40 else name[:38].rstrip() + " \u2026"


def static(table: pd.DataFrame, styles: Mapping[str, Style], baseline: str) -> Figure:
    """The same chart on paper."""
    names = list(dict.fromkeys(table["line"]))
    with canvas.style():
        chart = canvas.figure(7.6, 0.9 + 0.22 * max(1, len(names)))
        chart.subplots_adjust(left=2.6 / 7.6)
        axes = chart.subplots()
        axes.grid(visible=False, axis="y")
        rows = {name: len(names) - 1 - index for index, name in enumerate(names)}
        for (ours, forecast, series), some in table.groupby(["ours", "forecast", "series"], sort=True):
            style = styles[str(series)]
            look: dict[str, Any] = {"color": style.color, "linewidth": 5}
            if not ours:
                look = {"color": canvas.INK, "linewidth": 1.2}
            x, y = _gaps(some, rows)
            dotted: dict[str, Any] = {"linestyle": ":"} if forecast else {"solid_capstyle": "butt"}
            axes.plot(
                [math.nan if v is None else v for v in x], [math.nan if v is None else v for v in y], **look, **dotted
            )
            some = some[some["crossing"].notna()]
            axes.errorbar(some["crossing"], some["line"].map(rows), linestyle="none", marker=MPL_MARKERS[style.marker],
                          xerr=[(some["crossing"] - some["low"]).clip(0), (some["high"] - some["crossing"]).clip(0)],
                          color=style.color, markersize=6, markeredgecolor="white" if not forecast else style.color,
                          markerfacecolor="none" if forecast else style.color)  # fmt: skip
        axes.set_yticks(range(len(names)), [shortened(name) for name in reversed(names)])
        axes.set_ylim(-0.6, max(1, len(names)) - 0.4)
        lengths = [*table["start"], *table["end"]] or [1.0]
        canvas.bare_log(axes, "x", *token_scale(lengths))
        axes.set_xlim(*(10**edge for edge in scales.log_range(lengths, 0.03)))
        axes.set_xlabel(LENGTH)
        axes.set_title(f"thick where the method is faster than {printable(baseline)}", fontsize=9, loc="left")
        return chart
