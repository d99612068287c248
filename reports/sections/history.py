"""Several runs of one machine: what every cell took from run to run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ctxbench.analysis.history import Trend, histories
from ctxbench.analysis.noise import identity
from ctxbench.analysis.runs import Run
from ctxbench.errors import UserError
from ctxbench.reports.figures import history
from ctxbench.reports.report import Report
from ctxbench.reports.swatch import legend
from ctxbench.units import format_tokens


def wanted(report: Report) -> bool:
    """Whether there is anything to follow: three runs or more, two of which at least share a machine."""
    return len(report.runs) > 2


def context(report: Report) -> dict[str, Any]:
    """What ``history.j2`` prints, for the machine that most of the runs are from."""
    runs, others = machine_runs(report.runs)
    order = {run.name: str(run.info.get("created_at") or run.name)[:16].replace("T", " ") for run in runs}
    table = history.data(report.frame, order)
    if table.empty:
        return {"sentence": "No cell was measured in two of these runs on one machine.", "others": others}
    lengths = sorted(set(table["seq_len"]))
    usual = max(lengths, key=lambda length: (int((table["seq_len"] == length).sum()), length))
    shown = report.shown(report.views[0])
    charts = [
        report.chart(
            f"history-{i}", f"Time per call at {format_tokens(length)} tokens over the runs, in units of the first",
            history.interactive(table[table["seq_len"] == length], order, report.looks, shown),
            partial(history.static, table[table["seq_len"] == length], order, report.looks, shown),
            draw=length == usual,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip
    return {
        "sentence": "", "others": others, "chart": charts[lengths.index(usual)],
        "lengths": [format_tokens(length) for length in lengths], "at": lengths.index(usual),
        "length": format_tokens(usual), "runs": list(order.items()), "steps": steps(runs, order),
        "head": ("cell", "tokens", "made at", "run", "change", "ratio to the run before", "95 % interval"),
        "legend": legend(report.frame, report.styles, report.looks, shown),
    }  # fmt: skip


def steps(runs: list[Run], order: Mapping[str, str]) -> list[list[str]]:
    """A line for every run at which a cell became faster or slower than in the run before, the newest first."""
    try:
        trends = [trend for history in histories(runs) for trend in history.trends]
    except UserError:  # no cell was measured twice
        return []
    found = [(moment, trend) for trend in trends for moment in trend.steps]
    place = {name: index for index, name in enumerate(order)}
    return [
        [
            f"{trend.method} / {trend.impl}{_size(trend)}", format_tokens(trend.seq_len), order[moment.run], moment.run,
            moment.step, f"{moment.ratio:.3f}", f"{moment.ratio_low:.3f} to {moment.ratio_high:.3f}",
        ]
        for moment, trend in sorted(found, key=lambda pair: -place[pair[0].run])
        if moment.ratio is not None and moment.ratio_low is not None and moment.ratio_high is not None
    ]  # fmt: skip


def _size(trend: Trend) -> str:
    memory = f", memory {format_tokens(trend.memory)}" if trend.memory else ""
    return f", {trend.mode}, {trend.dtype}{memory}"


def machine_runs(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The runs of the machine that has the most of them, the oldest first, and the names of the others."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        devices = sorted({row.device for row in run.rows})
        groups.setdefault(repr([identity(run.info, device) for device in devices]), []).append(run)
    chosen = max(groups.values(), key=len)
    chosen.sort(key=lambda run: str(run.info.get("created_at") or min((r.started_at for r in run.rows), default="")))
    return chosen, [run.name for run in runs if run not in chosen]
