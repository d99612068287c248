"""Measuring some cells of an earlier run again, in a folder of their own: what ``verify`` and ``compare`` share."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ctxbench.cli.common import Common
from ctxbench.config import Config, change_limits, require_devices
from ctxbench.errors import RunFolderError, UserError
from ctxbench.registry import Registry
from ctxbench.run import session
from ctxbench.run.progress import reporter
from ctxbench.run.store import new_folder, read_rows
from ctxbench.suite import Limits

if TYPE_CHECKING:
    from ctxbench.analysis.compare import Comparison, Side
    from ctxbench.analysis.runs import Run


def stored_config(then: Run, methods: Collection[str], registry: Registry) -> Config:
    """The configuration a run was measured with.

    Raises:
        RunFolderError: run.json has none that this version can read.
        UserError: one of the methods is not there now.
    """
    missing = sorted(set(methods) - set(registry.entries))
    if missing:
        raise UserError(
            f"{then.name} measures {', '.join(missing)}, which is not installed\n"
            f"  accepted: {', '.join(registry.names())}\n  name the folder of a plug-in with --plugin PATH"
        )
    try:
        config = msgspec.convert(then.info.get("config"), Config)
    except msgspec.ValidationError as error:
        raise RunFolderError(
            f"{then.folder / 'run.json'} has no configuration that this version can repeat: {error}\n"
            "  measure it again with `ctxbench run`"
        ) from None
    return msgspec.structs.replace(config, methods=[name for name in config.methods if name in registry.entries])


def measure(config: Config, registry: Registry, folder: Path, cells: Collection[str], ctx: Common) -> bool:
    """Measure the cells with these keys; True when interrupted."""
    progress = reporter(ctx.progress_console(), ctx.quiet)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    command_line = shlex.join(["ctxbench", *sys.argv[1:]])
    try:
        summary, _ = session.execute(config, registry, folder, command_line, progress=progress, only=set(cells))
    finally:
        signal.signal(signal.SIGTERM, previous)
    for note in summary.notes:
        ctx.note(note)
    return summary.interrupted


def with_fresh_rows(left: Side, right: Side, found: Comparison, ctx: Common) -> tuple[Side, Side]:
    """The two sides with fresh rows for their unclear cells, where this machine and this software measured them.

    Raises:
        UserError: neither side can be measured again here.
    """
    from ctxbench.analysis.compare import Verdict, least_processes

    unclear = [cell for cell in found.cells if cell.verdict is Verdict.UNCLEAR]
    if not unclear:
        return left, right
    processes = max(8, least_processes(len(unclear)))
    wanted: dict[Path, tuple[Run, set[str]]] = {}
    for side, cells in ((left, {cell.cell_a for cell in unclear}), (right, {cell.cell_b for cell in unclear})):
        wanted.setdefault(side.run.folder.resolve(), (side.run, set()))[1].update(cells)
    fresh, refusals = {}, []
    for place, (run, cells) in wanted.items():
        objection = _cannot_repeat(run, cells, ctx)
        if objection:
            refusals.append(f"{run.name} cannot be measured again here: {objection}")
        else:
            fresh[place] = _fresh(run, cells, processes, ctx)
    for refusal in refusals if fresh else ():
        ctx.note(refusal)
    if not fresh:
        raise UserError(
            "\n  ".join([*refusals, "leave --again out; the commands below the table measure them by hand"])
        )
    sides = [dataclasses.replace(side, run=fresh.get(side.run.folder.resolve(), side.run)) for side in (left, right)]
    return sides[0], sides[1]


def _cannot_repeat(run: Run, cells: set[str], ctx: Common) -> str:
    """Why measuring these cells now would not measure what the run did; empty where it would."""
    from ctxbench.analysis import noise
    from ctxbench.analysis.compare import software_changes

    present = {"environment": session.fingerprint(), "versions": session.versions(ctx.registry())}
    for device in sorted({row.device for row in run.rows if row.cell in cells}):
        if noise.identity(run.info, device) != noise.identity(present, device):
            return "it is from another machine"
    trees = [(info.get("environment") or {}).get("git") or {} for info in (run.info, present)]
    if any(tree.get("changed") for tree in trees):
        return "its source or today's has uncommitted changes, so nobody can tell whether they are the same"
    return "; ".join(software_changes(run.info, present))


def _fresh(run: Run, cells: set[str], processes: int, ctx: Common) -> Run:
    """The run with these cells measured now, in a folder beside its own; it keeps the old row where that fails."""
    from ctxbench.analysis.runs import read_run

    registry = ctx.registry()
    methods = {row.method for row in run.rows if row.cell in cells}
    config = change_limits(stored_config(run, methods, registry), Limits())
    config = msgspec.structs.replace(config, protocol=msgspec.structs.replace(config.protocol, processes=processes))
    require_devices(config)
    folder = new_folder(run.folder.resolve().parent, "again")
    if measure(config, registry, folder, cells, ctx):
        raise KeyboardInterrupt
    now = {row.cell: row for row in read_rows(folder) if row.measured}
    ctx.note(f"{len(now)} of {len(cells)} unclear cells of {run.name} were measured again: {folder}")
    then = read_run(run.folder)
    return dataclasses.replace(then, rows=tuple(now.get(row.cell, row) for row in then.rows))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
