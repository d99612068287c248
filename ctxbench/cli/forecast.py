"""``ctxbench forecast``: time and memory of cells nobody measured, with intervals. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options, table
from ctxbench.cli.selection import print_config as show_config
from ctxbench.cli.selection import selection_options
from ctxbench.errors import UserError
from ctxbench.run.store import RUN
from ctxbench.suite import Suite
from ctxbench.units import counted, format_bytes, format_seconds, format_tokens

if TYPE_CHECKING:
    from ctxbench.analysis.holdout import Holdout


class Lengths(click.IntRange):
    """A number of lengths; a run in its place is told where runs go."""

    name = "lengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the number, at least 1."""
        if isinstance(value, str) and (Path(value) / RUN).is_file():
            self.fail(f"{value!r} is a run and not a number of lengths; accepted: --run {value} --check", param, ctx)
        return super().convert(value, param, ctx)


@click.command()
@selection_options
@click.option("--run", "folder", type=click.Path(path_type=Path), help="Forecast from the rows of this run.")
@click.option(
    "--check", "held", is_flag=False, flag_value=1, type=Lengths(1), metavar="[N]",
    help="Hold out the N largest lengths of each series of the run and forecast them from the rest.",
)  # fmt: skip
@common_options
def command(
    suite: str | None, flags: Suite, print_config: bool, folder: Path | None, held: int | None, ctx: Common
) -> None:
    """Forecast time and memory of cells, with 95 % intervals; a power law stands beside.

    With --run, each method's own cost terms are fitted to what the run measured. Without, the roofline answers:
    from this machine's calibrated ceilings, or with --device a100, h100 or h200 from datasheet peaks.
    """
    from ctxbench.analysis.forecast import fits
    from ctxbench.cli.target import refuse_run, target

    refuse_run(suite)
    registry = ctx.registry()
    if held is not None and folder is None:
        raise UserError("--check needs measured lengths\n  accepted: --run RUN, a folder that `ctxbench run` wrote")
    asked = target(suite, flags, folder, registry, ctx)
    if print_config:
        show_config(asked.config, ctx)
        return
    if held is not None:
        from ctxbench.analysis.holdout import holdout

        _print_check(holdout(asked.rows, registry, asked.ceilings, held), ctx)
        return
    cells = [planned for planned in asked.cells if planned.status in ("planned", "skipped")]
    found = [asked.forecaster.estimate(planned.cell) for planned in cells]
    beside = [asked.forecaster.beside(planned.cell) for planned in cells]
    memory = [fits(each, needed, asked.limit) for each, needed in zip(found, beside, strict=True)]
    refused = [planned for planned in asked.cells if planned.status in ("unsupported", "error")]
    if ctx.json:
        ctx.emit(
            {
                "machine": asked.title,
                "memory_limit": asked.limit,
                "cells": [
                    msgspec.to_builtins(each) | {"memory_verdict": verdict, "beside_bytes": needed}
                    for each, verdict, needed in zip(found, memory, beside, strict=True)
                ],
                "refused": [
                    {"method": planned.cell.method, "impl": planned.cell.impl, "mode": planned.cell.mode,
                     "seq_len": planned.cell.seq_len, "reason": planned.reason}
                    for planned in refused
                ],
            }
        )  # fmt: skip
        return
    click.echo(f"{asked.title}; memory limit {format_bytes(asked.limit)}")
    lines = [
        [
            f"{each.method} / {each.impl}", format_tokens(each.seq_len), format_tokens(each.memory), each.mode,
            format_seconds(each.latency_s), f"{format_seconds(each.low)} to {format_seconds(each.high)}",
            format_seconds(each.power_law_s), format_bytes(each.peak_bytes),
            format_bytes(None if each.peak_at_most is None else each.peak_at_most + needed), verdict, each.source,
            each.basis,
        ]
        for each, verdict, needed in zip(found, memory, beside, strict=True)
    ]  # fmt: skip
    if lines:
        click.echo(table(HEADERS, lines))
    if refused:
        more = "" if ctx.verbose else " (-v lists them)"
        click.echo(f"left out, for want of a meaning or of an implementation here: {len(refused)}{more}")
    for planned in refused if ctx.verbose else ():
        click.echo(f"  {planned.cell.label()} at {format_tokens(planned.cell.seq_len)}: {planned.reason}")


HEADERS = [
    "METHOD / IMPL", "LENGTH", "MEMORY", "MODE", "TIME", "INTERVAL", "POWER LAW", "PEAK", "NEEDS", "MEMORY LIMIT",
    "SOURCE", "BASIS",
]  # fmt: skip


def _print_check(found: Holdout, ctx: Common) -> None:
    if ctx.json:
        ctx.emit(found)
        return
    lines = [
        [
            f"{cell.method} / {cell.impl}", format_tokens(cell.seq_len), cell.mode, format_seconds(cell.measured_s),
            *([format_seconds(cell.steady_s)] if found.steady else []), format_seconds(cell.forecast_s),
            f"{format_seconds(cell.low)} to {format_seconds(cell.high)}",
            f"{100 * cell.error:.1f} %", f"{100 * cell.power_law_error:.1f} %",
            "inside" if cell.low <= cell.measured_s <= cell.high else "outside",
        ]
        for cell in found.cells
    ]  # fmt: skip
    steady = ["AT ONE SPEED"] if found.steady else []
    headers = ["METHOD / IMPL", "LENGTH", "MODE", "MEASURED", *steady, "FORECAST", "INTERVAL", "ERROR", "POWER LAW", ""]
    click.echo(table(headers, lines))
    click.echo(
        f"{counted(len(found.cells), 'cell')} held out: median error {100 * found.median_error:.1f} %, of a power law "
        f"{100 * found.power_law_median_error:.1f} %; {100 * found.coverage:.0f} % inside their intervals"
    )
    if found.steady is not None:
        click.echo(
            f"at one speed of the machine, by the reference beside the samples: median error "
            f"{100 * found.steady.median_error:.1f} %; {100 * found.steady.coverage:.0f} % inside their intervals"
        )
    click.echo(f"memory: {found.false_fits} of {found.peaks} peaks above what the forecast would have reserved")
    if found.disturbed:
        click.echo(f"{found.disturbed} rows rest on processes beside which other work ran, and are left out")
