"""``ctxbench merge``: several run folders as one. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options
from ctxbench.units import counted

KEEP = ("first", "last")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The new run folder.")
@click.option("--keep", type=click.Choice(KEEP), default=None, help="Which one, where several runs measured a cell.")
@common_options
def command(runs: tuple[Path, ...], out: Path, keep: str | None, ctx: Common) -> None:
    """Join RUNs in one folder: the parts that `ctxbench run --shard 1/3` to `3/3` measured, or runs of other methods.

    Every cell has one row: a measurement goes before a failure, a failure before a skip. Rows of another machine than
    the first run's are marked. RUNs are not changed.
    """
    from ctxbench.analysis.merge import merge
    from ctxbench.analysis.runs import read_runs

    sources = read_runs(runs)
    for run in sources:
        for warning in run.warnings:
            ctx.note(f"{run.name}: {warning}")
    found = merge(sources, out, keep or "")
    if ctx.json:
        plain: dict[str, Any] = msgspec.to_builtins(found)
        ctx.emit(plain)
        return
    for note in found.notes:
        ctx.note(note)
    counts = ", ".join(f"{count} {status}" for status, count in found.counts.items())
    click.echo(f"{counted(found.rows, 'row')} of {counted(len(sources), 'run')} ({counts})")
    click.echo(f"rows    {Path(found.folder) / 'rows.jsonl'}")
    click.echo(f"next    ctxbench report {found.folder}")
