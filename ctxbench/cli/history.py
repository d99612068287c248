"""``ctxbench history``: the runs of one machine in order of time, cell by cell. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ctxbench.cli.common import Common, common_options, table
from ctxbench.cli.compare import SIGNS
from ctxbench.units import counted, format_seconds, format_tokens

if TYPE_CHECKING:
    from ctxbench.analysis.history import History, Trend

BARS = "▁▂▃▄▅▆▇█"
RAW = "AS MEASURED"
HEADERS = [
    "", "METHOD / IMPL", "LENGTH", "MEMORY", "MODE", "RUNS", "FIRST", "LAST", "RATIO", RAW, "TREND", "SINCE", "STEPS",
]  # fmt: skip


@click.command()
@click.argument("places", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER|RUN]...")
@click.option("--changed", is_flag=True, help="Only cells that became faster or slower.")
@common_options
def command(places: tuple[Path, ...], changed: bool, ctx: Common) -> None:
    """Show how cells went from run to run on each machine: FOLDER holds runs, default runs/.

    SINCE compares the last run with the first, STEPS names the runs at which a cell changed; both by the rules of
    `ctxbench compare`. Bars go from the fastest to the slowest run of a cell. Where rows timed the reference beside
    their samples, RATIO and bars are at one speed of the machine, and AS MEASURED is the ratio without that.
    `ctxbench report RUN RUN ...` plots them.
    """
    from ctxbench.analysis.history import find_runs, histories

    runs = find_runs(places or (Path("runs"),))
    for run in runs:
        for warning in run.warnings:
            ctx.note(f"{run.name}: {warning}")
    found = histories(runs)
    if changed:
        found = [msgspec.structs.replace(one, trends=[t for t in one.trends if _has_changed(t)]) for one in found]
    if ctx.json:
        ctx.emit(found)
        return
    for history in found:
        _print(history)


def _has_changed(trend: Trend) -> bool:
    return bool(trend.steps) or trend.verdict in ("faster", "slower")


def _print(history: History) -> None:
    machine = ", ".join(f"{name} {value}" for name, value in history.machine.items() if name in ("cpu", "cores", "gpu"))
    click.echo(f"{history.device}: {machine}\n{counted(len(history.runs), 'run')}: {', '.join(history.runs)}")
    if not history.trends:
        click.echo("no cell changed\n")
        return
    timed = any(trend.at_one_speed for trend in history.trends)
    headers = [name for name in HEADERS if timed or name != RAW]
    click.echo(table(headers, [_line(trend, timed) for trend in history.trends]) + "\n")


def _line(trend: Trend, timed: bool) -> list[str]:
    return [
        SIGNS.get(trend.verdict, ""),
        f"{trend.method} / {trend.impl}",
        format_tokens(trend.seq_len),
        format_tokens(trend.memory),
        trend.mode,
        str(len(trend.moments)),
        format_seconds(trend.moments[0].median_s),
        format_seconds(trend.moments[-1].median_s),
        "-" if trend.ratio is None else f"{trend.ratio:.3f}",
        *(["-" if trend.raw_ratio is None else f"{trend.raw_ratio:.3f}"] if timed else []),
        bars([(trend.at_one_speed and moment.steady_s) or moment.median_s for moment in trend.moments]),
        trend.verdict,
        ", ".join(f"{moment.step} x{moment.ratio:.2f} at {moment.run}" for moment in trend.steps) or "-",
    ]


def bars(values: list[float]) -> str:
    """One block a value, between the least and the greatest; all low where they differ by less than 5 %."""
    least, span = min(values), max(values) - min(values)
    if span < 0.05 * least:
        return BARS[0] * len(values)
    return "".join(BARS[round((value - least) / span * (len(BARS) - 1))] for value in values)
