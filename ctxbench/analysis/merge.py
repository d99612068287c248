"""Several run folders as one: the parts of a plan that machines shared, or runs of different methods.

A cell that several runs hold gives one row: a measurement before a failure, a failure before a skip. Two measurements
of one cell are a comparison, not a sum, so that they are refused unless the caller says which to keep. Rows of another
machine than the first run's say so.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ctxbench.analysis import noise
from ctxbench.analysis.compare import software_changes
from ctxbench.analysis.runs import Run
from ctxbench.errors import RunFolderError, UserError
from ctxbench.rows import FAILURES, Row
from ctxbench.run.assemble import codes
from ctxbench.run.store import Store, now
from ctxbench.text import Warn


class Merged(msgspec.Struct, kw_only=True):
    """What came together: the folder, its rows by status, and what a reader of it must know."""

    folder: str
    rows: int
    counts: dict[str, int]
    notes: list[str]
    missing: int = 0


def merge(runs: Sequence[Run], out: Path, keep: str = "") -> Merged:
    """Write the rows of all runs into a new folder.

    Args:
        runs: at least two, the first one gives the header.
        out: a new or empty folder.
        keep: ``first`` or ``last``, where several runs measured one cell; empty refuses that.

    Raises:
        UserError: fewer than two runs, or cells that several of them measured.
        RunFolderError: other protocols, or a folder that is in use.
    """
    if len(runs) < 2:
        raise UserError(f"merging takes at least two runs, received {len(runs)}\n  accepted: RUN RUN ... --out FOLDER")
    _check_protocols(runs)
    rows = _chosen(runs, keep)
    notes = [*_mark_machines(runs, rows)]
    for run in runs[1:]:
        notes += [f"{run.name}: {change}" for change in software_changes(runs[0].info, run.info)]
    missing, about = _coverage(runs, rows)
    notes += about
    header = _header(runs, out)
    with Store.open(out) as store:
        if store.rows or store.header:
            raise RunFolderError(f"{out} holds a run already\n  accepted: a new or empty folder, with --out")
        for row, _ in rows.values():
            store.append_row(row)
        counts = dict(Counter(row.status for row, _ in rows.values()))
        warnings = Counter(code for row, _ in rows.values() for code in sorted(set(codes(row))))
        store.write_header({**header, "counts": counts, "warnings": dict(warnings.most_common()), "notes": notes})
    return Merged(folder=str(out), rows=len(rows), counts=counts, notes=notes, missing=missing)


def _check_protocols(runs: Sequence[Run]) -> None:
    found = {run.name: (run.info.get("versions") or {}).get("protocol") for run in runs}
    if len({value for value in found.values() if value is not None}) > 1:
        shown = ", ".join(f"{name}: {value}" for name, value in found.items())
        raise RunFolderError(
            f"the runs were measured by different protocols, so their numbers cannot stand in one table ({shown})\n"
            "  measure the older ones again"
        )


def _chosen(runs: Sequence[Run], keep: str) -> dict[str, tuple[Row, Run]]:
    """One row a cell, with the run it comes from."""
    found: dict[str, list[tuple[Row, Run]]] = defaultdict(list)
    for run in runs:
        for row in run.rows:
            found[row.cell].append((row, run))
    twice = [rows for rows in found.values() if sum(row.measured for row, _ in rows) > 1]
    if twice and not keep:
        row = twice[0][0][0]
        names = " and ".join(run.name for row, run in twice[0] if row.measured)
        raise UserError(
            f"{len(twice)} cells were measured by more than one run, such as {row.method}/{row.impl} at {row.seq_len} "
            f"tokens by {names}\n  accepted: --keep first or --keep last\n  `ctxbench compare` shows how they differ"
        )
    if keep == "last":
        found = {cell: rows[::-1] for cell, rows in found.items()}  # type: ignore[assignment]
    return {cell: min(rows, key=lambda item: _rank(item[0])) for cell, rows in found.items()}


def _rank(row: Row) -> int:
    """A measurement says more than a failure, a failure more than a skip."""
    return 0 if row.measured else 1 if row.status in FAILURES else 2


def _mark_machines(runs: Sequence[Run], rows: dict[str, tuple[Row, Run]]) -> list[str]:
    """Write into every row of another machine which one it was; says so once a run."""
    notes = {}
    for cell, (row, run) in rows.items():
        here, there = noise.identity(runs[0].info, row.device), noise.identity(run.info, row.device)
        if run is runs[0] or (here and here == there) or not row.measured:
            continue
        shown = ", ".join(f"{name} {value}" for name, value in there.items() if value != here.get(name))
        notes[run.name] = f"{run.name} was measured on another machine ({shown or 'it does not say which'})"
        row = msgspec.structs.replace(
            row,
            warnings=[*row.warnings, Warn.OTHER_MACHINE(shown)],
            env_delta={**row.env_delta, "machine": there, "run": run.name},
        )
        rows[cell] = row, run
    return list(notes.values())


def _coverage(runs: Sequence[Run], rows: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Cells of a shared plan that have no row, and which part they belong to."""
    plans = [run.info.get("plan") or {} for run in runs]
    if len({plan.get("digest") for plan in plans}) > 1 or not plans[0].get("digest"):
        return 0, []
    missing = max(int(plans[0]["whole"]) - len(rows), 0)
    if not missing:
        return 0, []
    parts = [part for run in runs if (part := _config(run).get("shard"))]
    known = f"the parts here are {', '.join(sorted(parts))}" if parts else "a run was interrupted"
    return missing, [f"{missing} of {plans[0]['whole']} planned cells have no row: {known}"]


def _config(run: Run) -> dict[str, Any]:
    return run.info.get("config") or {}


def _header(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """``run.json``: the first run's, all sessions, and where every row comes from.

    The configuration stays only where all runs had the same, but for the part: a run that continues this folder keeps
    the cells of its own plan alone.
    """
    first = runs[0].info
    header = {
        **{key: value for key, value in first.items() if key not in ("schema", "plan", "config", "comparable")},
        "id": out.resolve().name,
        "command": _without_shard(str(first.get("command", ""))),
        "merged_at": now(),
        "merged_from": [
            {
                "id": run.info.get("id", run.name),
                "command": run.info.get("command", ""),
                "created_at": run.info.get("created_at", ""),
                "rows": len(run.rows),
                "machine": {name: noise.identity(run.info, name) for name in sorted({r.device for r in run.rows})},
            }
            for run in runs
        ],
        "status": "finished" if all(run.info.get("status") == "finished" for run in runs) else "interrupted",
        "sessions": [session for run in runs for session in run.info.get("sessions") or []],
    }
    plans = [run.info.get("plan") or {} for run in runs]
    if plans[0].get("digest") and len({plan.get("digest") for plan in plans}) == 1:
        header["plan"] = {**plans[0], "cells": plans[0]["whole"], "counts": {}}
        header["config"] = {**_config(runs[0]), "shard": ""}
        header["comparable"] = {**(first.get("comparable") or {}), "shard": ""}
    return header


def _without_shard(command: str) -> str:
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word == "--shard":
            next(words, None)
        elif not word.startswith("--shard="):
            kept.append(word)
    return shlex.join(kept)
