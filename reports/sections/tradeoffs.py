"""Time against memory at every length, and the length that fits into a limit."""

from __future__ import annotations

from typing import Any

from ctxbench.analysis.curves import best
from ctxbench.analysis.pareto import DISTURBED, FRONT, Frontier, frontier, pareto
from ctxbench.reports.figures import frontier as frontier_figure
from ctxbench.reports.figures import scales
from ctxbench.reports.figures import tradeoff as figure
from ctxbench.reports.report import Chart, Report, Setting
from ctxbench.reports.swatch import legend
from ctxbench.units import format_tokens

LIMITS = tuple(2**power for power in range(28, 38))  # 256 MiB to 128 GiB


def context(report: Report) -> dict[str, Any]:
    """What ``tradeoffs.j2`` prints; nothing but a sentence where nothing was measured."""
    if not report.settings:
        return {"sentence": "No cell of this run was measured, so nothing can be weighed.", "frontier": None}
    lengths = sorted({length for setting in report.settings for length in setting.lengths})
    main = report.settings[0]
    usual = _usual(main)
    chart = None
    for s, setting in enumerate(report.settings):
        for i, length in enumerate(lengths):
            made = _chart(report, setting, f"tradeoff-{s}-{i}", length, draw=s == 0 and length == usual)
            chart = made if s == 0 and length == usual else chart
    assert chart is not None
    return {
        "sentence": "",
        "chart": chart,
        "settings": [setting.label for setting in report.settings],
        "lengths": [format_tokens(length) for length in lengths],
        "at": lengths.index(usual),
        "length": format_tokens(usual),
        "legend": legend(report.frame, report.styles, report.looks, report.shown(report.views[0])),
        "disturbed": [format_tokens(length) for length in main.lengths if _disturbed(main, length)],
        "fronts": [(format_tokens(length), _front(main, length)) for length in main.lengths],
        "frontier": _frontier(report, main),
    }


def _usual(setting: Setting) -> int:
    """The longest length that at least half as many curves reach as any other."""
    counts = {length: sum(row.seq_len == length for curve in setting.curves for row in curve.rows)
              for length in setting.lengths}  # fmt: skip
    return max(length for length, count in counts.items() if 2 * count >= max(counts.values()))


def _disturbed(setting: Setting, length: int) -> bool:
    """Whether other work ran beside everything that was measured at this length."""
    found = pareto(setting.curves, length)
    return bool(found) and all(point.verdict == DISTURBED for point in found)


def _chart(report: Report, setting: Setting, key: str, length: int, draw: bool) -> Chart:
    table = figure.data(pareto(setting.curves, length), report.series_of.__getitem__)
    shown = set(table["series"])
    caption = f"Time per call against peak memory at {format_tokens(length)} tokens"
    caption += f", {setting.label}" if setting.label else ""
    return report.chart(key, caption, figure.interactive(table, report.looks, shown & report.shown(report.views[0])),
                        lambda: figure.static(table, report.looks), draw)  # fmt: skip


def _front(setting: Setting, length: int) -> str:
    found = pareto(setting.curves, length)
    if _disturbed(setting, length):
        return "other work ran beside all of them, so none is judged"
    points = [point for point in found if point.verdict == FRONT]
    texts = [f"{p.label} ({scales.text(p.latency_s, 's')}, {scales.text(p.peak_bytes, 'B')})" for p in points]
    return "; ".join(texts) or "no peak was measured"


def below_limits(report: Report, setting: Setting) -> list[tuple[str, Frontier]]:
    """What fits into every limit, of the best impl of each method and memory size, with its series."""
    forecaster = report.forecaster(setting)
    return [(report.series_of[curve.rows[-1].cell], each) for curve in best(setting.curves)
            for each in frontier([curve], setting.run.rows, forecaster, LIMITS)]  # fmt: skip


def _frontier(report: Report, setting: Setting) -> dict[str, Any] | None:
    """Largest lengths of the best impl of every method and memory size, where its peak is known."""
    found = below_limits(report, setting)
    table = frontier_figure.data(found)
    if not (table["by_formula"] > 0).any():
        return None
    limits = [limit for limit in LIMITS if (table.loc[table["limit"] == limit, "by_formula"] > 0).any()]
    table = table[table["limit"].isin(limits)]
    caption = "Largest length below a memory limit"
    chart = report.chart(
        "frontier",
        caption,
        frontier_figure.interactive(table, report.looks, set(table["series"])),
        lambda: frontier_figure.static(table, report.looks),
    )
    shown = limits[:: max(1, len(limits) // 4)]
    head = ("method, impl", *(scales.text(limit, "B") for limit in shown), "measured to", "against formula")
    lines: dict[tuple[str, str], list[Frontier]] = {}
    for series, each in found:
        if each.limit in shown:
            lines.setdefault((series, each.label), []).append(each)
    return {"chart": chart, "head": head, "lines": [_line(label, each) for (_, label), each in sorted(lines.items())],
            "setting": setting.label}  # fmt: skip


def _line(label: str, found: list[Frontier]) -> tuple[str, ...]:
    lengths = ["?" if each.by_formula is None else frontier_figure.about(each.by_formula) if each.by_formula else "none"
               for each in found]  # fmt: skip
    judged = [each.consistent for each in found if each.consistent is not None]
    agreement = "" if not judged else "agrees" if all(judged) else "contradicted"
    return (label, *lengths, format_tokens(max(each.measured for each in found)) if found else "", agreement)
