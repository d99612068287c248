"""``ctxbench run``: measure a plan, write rows and a report. This process never imports torch."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options
from ctxbench.cli.plan import show_plan
from ctxbench.cli.selection import configure, print_config, selection_options, shard_option
from ctxbench.config import Config, change_limits, require_devices
from ctxbench.errors import CtxbenchError, Exit, UserError
from ctxbench.registry import Registry
from ctxbench.run import session
from ctxbench.run.progress import reporter
from ctxbench.run.store import new_folder, read_run
from ctxbench.run.supervisor import RERUN, Summary
from ctxbench.suite import Suite

RUNS = Path("runs")


@click.command()
@selection_options
@shard_option
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default a new one under runs/.")
@click.option("--resume/--fresh", default=True, help="Continue what is in --out (default), or start over.")
@click.option("--rerun", type=click.Choice(RERUN), help="Measure failed cells, or all, again.")
@click.option("--dry-run", is_flag=True, help="Show the plan only.")
@click.option("--report/--no-report", default=True, help="Write report.html at the end.")
@common_options
def command(
    suite: str | None, flags: Suite, print_config: bool, out: Path | None, resume: bool, rerun: str | None,
    dry_run: bool, report: bool, shard: str, ctx: Common,
) -> None:  # fmt: skip
    """Measure SUITE (default quick; scaling when --seq or --methods is given); write rows and a report.

    Every combination of the axes yields one row, whatever happens to it. With --out FOLDER and nothing else, the run in
    that folder is continued. Ctrl-C keeps all finished rows.
    """
    registry = ctx.registry()
    config = _stored(out, suite, flags, registry) if resume and not shard else None
    config = config or configure(suite, flags, registry, shard)
    if print_config:
        show_config(config, ctx)
        return
    if dry_run:
        show_plan(config, registry, ctx)
        return
    if rerun and out is None:
        raise UserError(f"--rerun {rerun} needs the folder of an earlier run\n  accepted: --out FOLDER")
    require_devices(config)
    folder = out or new_folder(RUNS, config.suite)
    summary = _execute(config, registry, folder, not resume, rerun or "", ctx)
    page = _report(folder, registry, ctx) if report else None
    if ctx.json:
        ctx.emit(_as_json(summary, folder, page))
    elif not ctx.quiet:
        from ctxbench.cli.summary import print_summary

        print_summary(summary.rows, registry, ctx.console())
    if not ctx.json:
        _print_end(summary, folder, page, ctx)
    if summary.exit_code != Exit.OK:
        sys.exit(int(summary.exit_code))


def show_config(config: Config, ctx: Common) -> None:
    """Print the merged configuration."""
    print_config(config, ctx)


def _stored(out: Path | None, suite: str | None, flags: Suite, registry: Registry) -> Config | None:
    """The configuration of the run in ``--out``, where nothing else was chosen; its limits can be changed.

    Raises:
        UserError: when a method of that run is not there now.
    """
    if (
        out is None
        or suite is not None
        or flags.axes != Suite().axes
        or flags.params
        or flags.protocol != Suite().protocol
    ):
        return None
    stored = read_run(out).get("config") if out.is_dir() else None
    if stored is None:
        return None
    config = msgspec.convert(stored, Config)
    missing = [name for name in config.methods if name not in registry.entries]
    if missing:
        raise UserError(
            f"the run in {out} measures {', '.join(missing)}, which is not installed\n"
            f"  accepted: {', '.join(registry.names())}\n  name the folder of a plug-in with --plugin PATH"
        )
    return change_limits(config, flags.limits)


def _execute(config: Config, registry: Registry, folder: Path, fresh: bool, rerun: str, ctx: Common) -> Summary:
    progress = reporter(ctx.progress_console(), ctx.quiet)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        summary, _ = session.execute(config, registry, folder, _command_line(), fresh, rerun, progress)
    finally:
        signal.signal(signal.SIGTERM, previous)
    for note in summary.notes:
        ctx.note(note)
    return summary


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _command_line() -> str:
    return shlex.join(["ctxbench", *sys.argv[1:]])


def _report(folder: Path, registry: Registry, ctx: Common) -> Path | None:
    """Write the page; a report that fails leaves the rows as they are."""
    if importlib.util.find_spec("ctxbench.reports.page") is None:
        ctx.note("this installation has no report module; the rows are complete")
        return None
    from ctxbench.reports import page

    try:
        path: Path = page.write([folder], registry=registry)
    except CtxbenchError as error:
        ctx.note(f"no report was written: {error}\n  the rows are complete; try `ctxbench report {folder}`")
        return None
    return path


def _as_json(summary: Summary, folder: Path, page: Path | None) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "rows": str(folder / "rows.jsonl"),
        "report": None if page is None else str(page),
        "interrupted": summary.interrupted,
        "elapsed_s": summary.elapsed_s,
        "cells": summary.planned,
        "counts": summary.counts(),
        "warnings": summary.warnings(),
        "exit_code": int(summary.exit_code),
    }


def _print_end(summary: Summary, folder: Path, page: Path | None, ctx: Common) -> None:
    if not ctx.quiet and summary.interrupted:
        again = shlex.join(["--out", str(folder), *(part for path in ctx.plugins for part in ("--plugin", path))])
        click.echo(f"interrupted; continue with `ctxbench run {again}`", err=True)
    click.echo(f"rows    {folder / 'rows.jsonl'}")
    if page is not None:
        click.echo(f"report  {page}")
