"""``ctxbench verify``: measure random cells of a run again. This process never imports torch."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options, table
from ctxbench.cli.remeasure import measure, stored_config
from ctxbench.config import change_limits, require_devices
from ctxbench.errors import Exit, UserError
from ctxbench.run import session
from ctxbench.run.store import new_folder, read_rows
from ctxbench.suite import Limits
from ctxbench.units import format_seconds, format_tokens

if TYPE_CHECKING:
    from ctxbench.analysis.verify import Repeat, Verification


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="Cells to repeat.")
@click.option("--seed", type=int, help="Which cells; printed, so that a choice can be repeated.")
@click.option("--budget", metavar="TIME", help="The repetition ends inside this. [as in RUN]")
@click.option("--out", type=click.Path(path_type=Path), help="Its run folder. [a new one beside RUN]")
@common_options
def command(run: Path, count: int, seed: int | None, budget: str | None, out: Path | None, ctx: Common) -> None:
    """Measure random cells of RUN again, in fresh processes, and say which fall where RUN expects them.

    The new rows are a run folder of their own; RUN is not changed. Exit code 1 when a cell fails now, or when more
    cells fall outside their 95 % interval than chance explains.
    """
    from ctxbench.analysis.compare import software_changes
    from ctxbench.analysis.runs import read_run
    from ctxbench.analysis.verify import check_machine, choose, verify

    registry = ctx.registry()
    then = read_run(run)
    seed = secrets.randbelow(10**6) if seed is None else seed
    chosen = choose(then, count, seed)
    config = change_limits(stored_config(then, {row.method for row in chosen}, registry), Limits(budget=budget))
    require_devices(config)
    check_machine(then, {"environment": session.fingerprint()}, chosen)
    folder = out or new_folder(run.resolve().parent, "verify")
    if (folder / "rows.jsonl").exists():
        raise UserError(f"{folder} holds a run already\n  accepted: --out NEW, or nothing for a new folder beside RUN")
    interrupted = measure(config, registry, folder, {row.cell for row in chosen}, ctx)
    found = verify(then, chosen, read_rows(folder), str(folder), seed)
    for note in software_changes(then.info, read_run(folder).info if found.judged else then.info):
        ctx.note(note)
    code = Exit.INTERRUPTED if interrupted else Exit.CELLS_FAILED if found.failed else Exit.OK
    if ctx.json:
        plain: dict[str, Any] = msgspec.to_builtins(found)
        ctx.emit({**plain, "exit_code": int(code)})
    else:
        _print(found)
    if code != Exit.OK:
        sys.exit(int(code))


def _print(found: Verification) -> None:
    timed = any(cell.speed for cell in found.cells)
    headers = ["", "METHOD / IMPL", "LENGTH", "MEMORY", "MODE", "THEN", "EXPECTED", "NOW", "N", "PEAK", "WHY"]
    headers[7:7] = ["REFERENCE"] if timed else []
    click.echo(table(headers, [_line(cell, timed) for cell in found.cells]))
    click.echo(f"{found.inside} of {found.judged} cells are where {found.run} expects them  (--seed {found.seed})")
    if found.raw_inside is not None:
        click.echo(
            f"{found.raw_inside} of {found.judged} without the reference: EXPECTED is at the machine's speed now, "
            "REFERENCE is what the product beside the samples takes now over then"
        )
    outside = found.judged - found.inside
    if outside:
        verdict = "more than" if found.p < 0.01 else "no more than"
        click.echo(f"{outside} outside 95 % intervals, {verdict} chance explains (p {found.p:.2g})")
    disturbed = [cell for cell in found.cells if cell.disturbed]
    if disturbed:
        share = f"{sum(bool(cell.inside) for cell in disturbed)} of {len(disturbed)}"
        click.echo(f"{len(disturbed)} ran beside other work and are not judged ({share} inside): `ctxbench doctor`")
    if found.floor is None:
        click.echo(
            "the intervals know the spread inside the run alone; `ctxbench compare A A2 --calibrate` adds the rest"
        )
    click.echo(f"rows    {Path(found.again) / 'rows.jsonl'}")


def _line(cell: Repeat, timed: bool) -> list[str]:
    expected = "-" if cell.low is None else f"{format_seconds(cell.low)} to {format_seconds(cell.high)}"
    return [
        "?" if cell.disturbed else {True: "=", False: "!", None: "?"}[cell.inside],
        f"{cell.method} / {cell.impl}",
        format_tokens(cell.seq_len),
        format_tokens(cell.memory),
        cell.mode,
        format_seconds(cell.then_s),
        expected,
        *([f"x{cell.speed:.2f}" if cell.speed else "-"] if timed else []),
        format_seconds(cell.now_s) if cell.now_s is not None else cell.status,
        f"{cell.n_then}, {cell.n_now}",
        {True: "same", False: "other", None: "-"}[cell.same_peak],
        cell.reason,
    ]
