"""Every figure of a run on paper, in one style, each with a title that becomes the name of its file."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from ctxbench.analysis import reach
from ctxbench.analysis.frame import View, views
from ctxbench.analysis.pareto import pareto
from ctxbench.analysis.runs import Run
from ctxbench.registry import Registry, discover
from ctxbench.reports.figures import crossing, frontier, memory, model, overview, roofline, tradeoff
from ctxbench.reports.figures import reach as reach_figure
from ctxbench.reports.figures.points import LATENCY, MEMORY, METRICS
from ctxbench.reports.report import Report
from ctxbench.reports.sections import crossovers, tradeoffs
from ctxbench.units import format_tokens


def gallery(run: Run, registry: Registry | None = None) -> Iterator[tuple[str, Figure]]:
    """Title and figure, one after the other; what a run has no data for is left out."""
    report = Report([run], registry or discover(), run.name)
    for view in report.views:
        yield from _over_length(report, view)
    yield from _memory_sizes(report)
    for setting in report.settings:
        for length in setting.lengths:
            table = tradeoff.data(pareto(setting.curves, length), report.series_of.__getitem__)
            title = _titled(f"tradeoff-{format_tokens(length)}", setting.label)
            if len(table):
                yield title, tradeoff.static(table, report.looks, legend=True)
    if report.settings:
        yield from _main_setting(report)
    for name, found in reach.read(run.folder).items():
        yield f"reach-{name}", reach_figure.static(found)


def _over_length(report: Report, view: View) -> Iterator[tuple[str, Figure]]:
    for metric in METRICS:
        table = overview.data(view.frame, metric)
        yield _titled(metric.key, view.label), overview.static(table, metric, report.looks, legend=True)
    for series, rows in view.frame.groupby("series", sort=True):
        table = model.data(rows)
        if table["latency_s"].notna().any():
            title = _titled(f"model-{series}", view.label)
            yield title, model.static(table, report.looks[str(series)], str(series))
    ceilings = report.ceilings(view)
    table = roofline.data(view.frame, ceilings)
    if len(table):
        yield _titled("roofline", view.label), roofline.static(table, report.looks, ceilings, legend=True)


def _memory_sizes(report: Report) -> Iterator[tuple[str, Figure]]:
    together = views(report.frame, across_memory=True)[0].frame
    sizes = together.groupby(["method", "impl"])["memory"].transform("nunique")
    swept = together[(sizes > 1) & together["memory"].notna()]
    for series, rows in swept.groupby("series", sort=True):
        table = memory.data(rows, LATENCY)
        yield f"memory-{series}", memory.heat_map(table, LATENCY, f"{series}: time per call")
    for length in sorted(int(each) for each in swept["seq_len"].unique()):
        for metric in (LATENCY, MEMORY):
            table = memory.at_length(swept, length, metric)
            title = f"memory-{metric.key}-{format_tokens(length)}"
            yield title, memory.static(table, metric, report.looks, legend=True)


def _main_setting(report: Report) -> Iterator[tuple[str, Figure]]:
    """Limits and crossovers, of the setting with the most measurements."""
    setting = report.settings[0]
    limits = frontier.data(tradeoffs.below_limits(report, setting))
    if (limits["by_formula"] > 0).any():
        yield "frontier", frontier.static(limits, report.looks, legend=True)
    found, names = crossovers.crossings(report, setting)
    for key in crossovers.baselines(found, names):
        table = crossing.data(found, key, names.__getitem__)
        label = crossing.label(key)
        yield f"crossovers-{label}", crossing.static(table, report.looks, label)


def _titled(start: str, label: str) -> str:
    return f"{start}-{label}" if label else start
