"""From which length on which method is the faster one: against a baseline, and among all at every memory size."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from ctxbench.analysis.crossover import NONE, Crossover, crossovers
from ctxbench.analysis.curves import Curve, best
from ctxbench.analysis.forecast import disturbed, latency
from ctxbench.reports.figures import crossing, scales
from ctxbench.reports.palette import Style
from ctxbench.reports.report import Report, Setting
from ctxbench.reports.swatch import swatch
from ctxbench.rows import Row
from ctxbench.units import format_tokens

USUAL = "dense"
MOST = 60  # lines of the table of crossings


def context(report: Report) -> dict[str, Any]:
    """What ``crossovers.j2`` prints, for the setting with the most measurements."""
    if not report.settings:
        return {"sentence": "No cell of this run was measured, so nothing can cross.", "setting": ""}
    setting = report.settings[0]
    found, names = crossings(report, setting)
    if not found:
        return {"sentence": "No two methods were measured at two common lengths, so nothing can cross.",
                "winners": _winners(report, setting.curves), "setting": setting.label}  # fmt: skip
    keys = baselines(found, names)
    charts = []
    for index, key in enumerate(keys):
        table = crossing.data(found, key, names.__getitem__)
        label = crossing.label(key)
        charts.append(report.chart(
            f"crossing-{index}", f"Where each method is faster than {label}",
            crossing.interactive(table, report.looks),
            partial(crossing.static, table, report.looks, label), draw=index == 0,
        ))  # fmt: skip
    crossed = sorted((each for each in found if each.source != NONE), key=lambda each: each.seq_len or 0.0)
    return {
        "sentence": "",
        "setting": setting.label,
        "chart": charts[0],
        "baselines": [crossing.label(key) for key in keys],
        "winners": _winners(report, setting.curves),
        "head": ("faster below", "faster above", "crossover", "90 % interval", "chance", "measured"),
        "lines": [_line(each) for each in crossed[:MOST]],
        "more": max(0, len(crossed) - MOST),
        "never": sum(each.source == NONE for each in found),
        "pairs": len(found),
    }


def crossings(report: Report, setting: Setting) -> tuple[list[Crossover], dict[crossing.Key, str]]:
    """Crossings of the best impls of any two methods, and the series of every curve."""
    forecaster, methods = report.forecaster(setting), dict[str, list[Curve]]()
    for curve in best(setting.curves):
        methods.setdefault(curve.method, []).append(curve)
    names = {(f"{curve.method} / {curve.impl}", curve.memory): report.series_of[curve.rows[-1].cell]
             for own in methods.values() for curve in own}  # fmt: skip
    pairs = itertools.combinations(sorted(methods), 2)
    return [each for a, b in pairs for each in crossovers(methods[a], methods[b], forecaster)], names


def baselines(found: list[Crossover], names: dict[crossing.Key, str]) -> list[crossing.Key]:
    """Whom the others can be held against: ``dense`` first, then by name."""
    ends = {end for each in found for end in ((each.a, each.memory_a), (each.b, each.memory_b))}
    return sorted(ends & set(names), key=lambda key: (not key[0].startswith(f"{USUAL} /"), key[0], key[1] or 0))


def _line(each: Crossover) -> tuple[str, ...]:
    assert each.seq_len is not None
    mark = " (forecast)" if each.source == crossing.FORECAST else ""
    return (
        crossing.label((each.a, each.memory_a)), crossing.label((each.b, each.memory_b)),
        crossing.about(each.seq_len) + mark, crossing.interval(each),
        "" if each.chance is None else f"{100 * each.chance:.0f} %",
        f"{format_tokens(each.first)} to {format_tokens(each.last)}",
    )  # fmt: skip


def _winners(report: Report, curves: list[Curve]) -> dict[str, Any]:
    """The fastest method at every length and memory size; methods without a choice of sizes compete at all of them."""
    sizes = {curve.method: {other.memory for other in curves if other.method == curve.method} for curve in curves}
    swept = sorted({size for own in sizes.values() if len(own) > 1 for size in own if size is not None})
    lengths = sorted({row.seq_len for curve in curves for row in curve.rows})
    rows = []
    every: list[int | None] = [*swept] or [None]
    for size in every:
        able = [curve for curve in curves if len(sizes[curve.method]) == 1 or curve.memory == size]
        name = "all methods" if size is None else format_tokens(size)
        rows.append((name, [_winner(report, able, length) for length in lengths]))
    return {"lengths": [format_tokens(length) for length in lengths], "rows": rows, "swept": bool(swept)}


def _winner(report: Report, curves: list[Curve], length: int) -> dict[str, Any]:
    """The fastest method at one length, each by the impl that is its fastest there, and who cannot be told from it."""
    every = sorted(
        ((curve, row) for curve in curves for row in curve.rows if row.seq_len == length),
        key=lambda pair: (disturbed(pair[1]), latency(pair[1])),
    )
    fastest: dict[str, tuple[Curve, Row]] = {}
    for pair in every:
        fastest.setdefault(pair[0].method, pair)
    here = list(fastest.values())
    if not here:
        return {"name": "", "title": "nothing was measured", "note": ""}
    (curve, row), *others = here
    look: Style = report.styles[curve.method]
    ties = [other.label for other, rival in others if _low(rival) <= _high(row)]
    title = f"{curve.label}: {scales.text(latency(row), 's')}"
    if others:
        title += f"; next {others[0][0].label}: {scales.text(latency(others[0][1]), 's')}"
    ahead = f"{latency(others[0][1]) / latency(row):.3g} \u00d7 ahead" if others else ""
    note = (
        (f"tied with {len(ties)} others" if len(ties) > 1 else f"tied with {ties[0].partition(' /')[0]}")
        if ties
        else ahead
    )
    return {"name": curve.method, "impl": curve.impl, "swatch": swatch(look), "color": look.color, "title": title,
            "note": note, "time": scales.text(latency(row), "s")}  # fmt: skip


def _low(row: Row) -> float:
    assert row.latency_s is not None
    return row.latency_s.low


def _high(row: Row) -> float:
    assert row.latency_s is not None
    return row.latency_s.high
