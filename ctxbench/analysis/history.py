"""How the cells of one machine went from run to run: medians in order of time, and the steps between them.

Runs are sorted into histories by machine, because a faster machine is not a faster method. A step is what
``ctxbench compare`` decides between two neighbouring runs of a cell; a drift too slow for any step shows in the verdict
of the last run against the first.

A shared host is not as fast in every run. Where the rows timed the reference product beside their samples, each moment
also has its time at one speed, the typical one of all runs (``analysis.steady``), and ratios are of those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis import noise
from ctxbench.analysis.compare import Compared, Side, Verdict, compare
from ctxbench.analysis.processes import processes
from ctxbench.analysis.runs import ROWS, Run, read_run
from ctxbench.analysis.steady import Steady
from ctxbench.errors import RunFolderError, UserError
from ctxbench.rows import Row

CHANGES = (Verdict.FASTER, Verdict.SLOWER)


class Moment(msgspec.Struct, kw_only=True):
    """One cell in one run. ``step`` compares it with the moment before, ``ratio`` over it with its 95 % interval.

    ``steady_s`` is the median at the typical speed of all runs, None without the reference beside the samples;
    ``reference_s`` are the reference kernels.
    """

    run: str
    created_at: str
    version: str
    commit: str
    median_s: float
    low_s: float
    high_s: float
    n_processes: int
    steady_s: float | None = None
    reference_s: dict[str, float] = {}
    step: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


class Trend(msgspec.Struct, kw_only=True):
    """One cell through all runs of a machine that measured it, oldest first.

    ``ratio`` is last over first, of the times at one speed where they are known: a coefficient from processes of the
    same run is not moved by what changed between the runs. ``raw_ratio`` is that of the medians as measured.
    """

    cell: str
    method: str
    impl: str
    mode: str
    dtype: str
    seq_len: int
    memory: int | None
    moments: list[Moment]
    verdict: str = ""
    ratio: float | None = None
    raw_ratio: float | None = None

    @property
    def at_one_speed(self) -> bool:
        """Whether every moment knows its time at one speed."""
        return all(moment.steady_s is not None for moment in self.moments)

    @property
    def steps(self) -> list[Moment]:
        """The moments at which the cell became faster or slower."""
        return [moment for moment in self.moments if moment.step in CHANGES]


class History(msgspec.Struct, kw_only=True):
    """All trends of one machine."""

    machine: dict[str, Any]
    device: str
    runs: list[str]
    trends: list[Trend]


def find_runs(places: Iterable[Path]) -> list[Run]:
    """The runs in these folders: run folders themselves, or folders that hold some.

    A run that cannot be read is left out where it was found by looking, and an error where it was named.

    Raises:
        RunFolderError: a named folder is no run and holds none.
    """
    found: dict[Path, Run] = {}
    for place in places:
        inside = sorted(path.parent for path in place.glob(f"*/{ROWS}")) if place.is_dir() else []
        if (place / ROWS).is_file() or not inside:
            found[place.resolve()] = read_run(place)
            continue
        for folder in inside:
            try:
                found.setdefault(folder.resolve(), read_run(folder))
            except RunFolderError:  # of another schema, or still without a row
                continue
    return sorted(found.values(), key=_moment)


def histories(runs: Sequence[Run]) -> list[History]:
    """One history a machine and device, for the cells that at least two of its runs measured; the longest first.

    Raises:
        UserError: no two runs of one machine have a measured cell in common.
    """
    by_machine: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=_moment):
        for device in sorted({row.device for row in run.rows if row.measured}):
            machine = noise.identity(run.info, device)
            if machine:
                by_machine[device, msgspec.json.encode(machine, order="sorted").decode()].append(run)
    found = [
        History(machine=msgspec.json.decode(machine), device=device, runs=[run.name for run in own], trends=trends)
        for (device, machine), own in by_machine.items()
        if (trends := _trends(own, device))
    ]
    if not found:
        names = ", ".join(run.name for run in runs) or "none"
        raise UserError(
            f"no two of the runs measured the same cell on the same machine (runs: {names})\n"
            "  accepted: two or more runs of one machine; `ctxbench run` with the same command adds one"
        )
    return sorted(found, key=lambda history: -len(history.runs))


def _moment(run: Run) -> tuple[str, str]:
    return str(run.info.get("created_at", "")), run.name


def _trends(runs: Sequence[Run], device: str) -> list[Trend]:
    rows = [
        {row.cell: row for row in run.rows if row.measured and row.device == device and _own(row)} for run in runs
    ]  # fmt: skip
    steady = Steady(row for measured in rows for row in measured.values())
    trends: dict[str, Trend] = {}
    for run, measured in zip(runs, rows, strict=True):
        for cell, row in measured.items():
            if sum(cell in others for others in rows) > 1:
                trend = trends.setdefault(cell, _trend(row))
                trend.moments.append(_at(run, row, steady))
    verdicts = _Verdicts(runs)
    for trend in trends.values():
        for before, after in zip(trend.moments, trend.moments[1:], strict=False):
            step = verdicts.of(before.run, after.run, trend.cell)
            after.step, after.ratio = str(step.verdict), step.ratio
            after.ratio_low, after.ratio_high = step.low, step.high
        first, last = trend.moments[0], trend.moments[-1]
        whole = verdicts.of(first.run, last.run, trend.cell)
        trend.verdict, trend.ratio = str(whole.verdict), whole.ratio
        trend.raw_ratio = last.median_s / first.median_s
        if first.steady_s and last.steady_s:
            trend.ratio = last.steady_s / first.steady_s
    order = ("method", "impl", "mode", "dtype", "seq_len")
    return sorted(trends.values(), key=lambda trend: tuple(getattr(trend, name) for name in order))


def _own(row: Row) -> bool:
    """Rows that a merged run brought from another machine belong to that machine's history."""
    return "machine" not in row.env_delta


class _Verdicts:
    """Comparisons of pairs of runs, each made once for all of their cells."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = {run.name: run for run in runs}
        self.known: dict[tuple[str, str], dict[str, Compared]] = {}

    def of(self, before: str, after: str, cell: str) -> Compared:
        if (before, after) not in self.known:
            found = compare(Side(self.runs[before]), Side(self.runs[after]))
            self.known[before, after] = {compared.cell_a: compared for compared in found.cells}
        return self.known[before, after][cell]


def _trend(row: Row) -> Trend:
    names = ("cell", "method", "impl", "mode", "dtype", "seq_len", "memory")
    return Trend(**{name: getattr(row, name) for name in names}, moments=[])


def _at(run: Run, row: Row, steady: Steady) -> Moment:
    assert row.latency_s is not None
    environment, versions = run.info.get("environment") or {}, run.info.get("versions") or {}
    references = processes(row).references
    return Moment(
        run=run.name,
        created_at=str(run.info.get("created_at", "")),
        version=str(versions.get("ctxbench", "")),
        commit=str((environment.get("git") or {}).get("commit", ""))[:9],
        median_s=row.latency_s.median,
        low_s=row.latency_s.low,
        high_s=row.latency_s.high,
        n_processes=row.latency_s.n_processes,
        steady_s=steady.seconds(row) if len(steady.off(row)) else None,
        reference_s={name: float(np.median(values)) for name, values in references.items()},
    )
