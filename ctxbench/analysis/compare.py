"""Two runs, or two impls of one run, cell by cell: faster, slower, same, unclear or invalid.

The unit is the process median; calls of one process are correlated and would prove differences between identical
programs. The rules, in this order:

========= =============================================================================================================
invalid   a side has no latency that passed its gate, or the machines differ and nothing relates them
unclear   so few processes that no outcome could reach ``ALPHA``; the reason names the number that could
unclear   the runs are two, and beside one of them other work ran on the machine
faster    exact Mann-Whitney, Holm-adjusted over all cells that could be decided, at most ``ALPHA``, and the
slower    Hodges-Lehmann ratio is beyond the noise floor
same      the 95 % interval of the ratio lies inside +-``SAME``: evidence of equality, not lack of evidence
unclear   everything else
========= =============================================================================================================

On one machine the test is of medians from which a regression has taken what the reference product timed between the
samples explains (``ranks.adjusted``): on a shared host most of the spread of identical processes is the machine's speed
of that second. Ratio, interval and noise floor are then those of the adjusted medians; seconds stay as measured.

Where the machines differ, or one machine ran its reference kernels at another speed (``SPEED``), a verdict must also
hold in units of either kernel, the arithmetic-bound and the memory-bound one: a real cell lies between the two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis import noise, ranks
from ctxbench.analysis.processes import KERNELS, Processes, processes
from ctxbench.analysis.runs import Run
from ctxbench.cell import Cell
from ctxbench.errors import UserError, unknown
from ctxbench.rows import FAILURES, Row, cell_of
from ctxbench.text import Warn, kind_of
from ctxbench.units import counted

ALPHA = 0.01  # chance of any wrong faster or slower in one comparison of identical code
SAME = 0.02  # a difference nobody needs to know
SPEED = 0.05  # change of a reference kernel beyond which a difference may be the machine's
SPEED_ALPHA = 0.05  # chance of suspecting a machine that did not change: a copy varies by more than SPEED by itself
CONFIDENCE = 0.95
LEAST_ADJUSTED = 4  # processes a side; fewer know no coefficient


class Verdict(StrEnum):
    """What a cell of B is against the same cell of A."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNCLEAR = "unclear"
    INVALID = "invalid"


class Compared(msgspec.Struct, kw_only=True):
    """One cell on both sides. Ratios are B over A: above 1 B is slower.

    ``low`` and ``high`` hold ``ratio`` with ``confidence``. ``p_holm`` is ``p`` adjusted for all cells; None where
    the processes are too few for any verdict. ``adjusted`` is the coefficient of the reference beside the samples that
    the ratio is adjusted with: 0 where it explains nothing, 1 where the call follows it, None without one. ``speed`` is
    what the reference kernels took in B over A; ``normalised`` says that the verdict, and between machines the ratio,
    are in units of them. ``disturbed`` names the sides that other work ran beside; two impls of one run are measured
    side by side, so it hit both and nothing is named.
    """

    method: str
    impl: str
    mode: str
    device: str
    dtype: str
    seq_len: int
    memory: int | None
    cell_a: str
    cell_b: str
    status_a: str
    status_b: str
    verdict: Verdict = Verdict.INVALID
    reason: str = ""
    a_s: float | None = None
    b_s: float | None = None
    n_a: int = 0
    n_b: int = 0
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None
    p: float | None = None
    p_holm: float | None = None
    floor: float | None = None
    adjusted: float | None = None
    speed: dict[str, float] = {}
    normalised: bool = False
    disturbed: str = ""


class Comparison(msgspec.Struct, kw_only=True):
    """All cells that both sides have, and those that only one has."""

    a: str
    b: str
    cells: list[Compared]
    only_a: list[str]
    only_b: list[str]
    notes: list[str]
    alpha: float = ALPHA

    def counts(self) -> dict[str, int]:
        """Cells by verdict, in the order of the verdicts."""
        found = Counter(cell.verdict for cell in self.cells)
        return {str(verdict): found[verdict] for verdict in Verdict if found[verdict]}

    def broken(self) -> list[Compared]:
        """Cells that A measured and that failed in B: no regression of speed, but no pass either."""
        return [cell for cell in self.cells if cell.n_a and cell.status_b in FAILURES]

    def regressions(self, threshold: float) -> list[Compared]:
        """Cells that are slower by at least the threshold."""
        return [c for c in self.cells if c.verdict is Verdict.SLOWER and c.ratio and c.ratio >= 1 + threshold]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a run, or one impl of it."""

    run: Run
    impl: str | None = None

    @property
    def name(self) -> str:
        """``RUN`` or ``RUN:IMPL``."""
        return self.run.name + (f":{self.impl}" if self.impl else "")

    def rows(self) -> list[Row]:
        """The rows of this side.

        Raises:
            UserError: the run has no such impl.
        """
        if self.impl is None:
            return list(self.run.rows)
        found = [row for row in self.run.rows if row.impl == self.impl]
        if not found:
            raise unknown(f"impl of {self.run.name}", self.impl, {row.impl for row in self.run.rows})
        return found


def compare(a: Side, b: Side, normalise: bool = False) -> Comparison:
    """Compare every cell that both sides have.

    Two impls are compared where everything but the impl is equal. ``normalise`` admits different machines.

    Raises:
        UserError: no cell in common, an impl that is not there, or machines that differ without ``normalise``.
    """
    by_impl = a.impl is not None or b.impl is not None
    left = {_key(row, by_impl): row for row in a.rows()}
    right = {_key(row, by_impl): row for row in b.rows()}
    pairs = [(row, right[key]) for key, row in left.items() if key in right]
    if not pairs:
        raise UserError(
            f"{a.name} and {b.name} have no cell in common\n  accepted: two runs of the same methods, impls, sizes, "
            "dtypes, device and --threads, or RUN:IMPL RUN:IMPL for two impls\n  `ctxbench show RUN` lists the cells"
        )
    foreign, notes = _machines(a, b, {row.device for row, _ in pairs}, normalise)
    found = [_readings(one, other, foreign) for one, other in pairs]
    floors, more = _floors(a, b, found)
    if a.run.folder.resolve() == b.run.folder.resolve():
        for reading in found:
            reading.cell.disturbed = ""
    _decide(found, floors)
    return Comparison(
        a=a.name,
        b=b.name,
        cells=[reading.cell for reading in found],
        only_a=[row.cell for key, row in left.items() if key not in right],
        only_b=[row.cell for key, row in right.items() if key not in left],
        notes=notes + more + software_changes(a.run.info, b.run.info),
    )


@dataclass
class _Reading:
    """One pair and every way to read it: in seconds, or in units of a reference kernel. All must agree.

    ``groups`` are the process medians of both sides, adjusted where the test is.
    """

    cell: Compared
    groups: list[np.ndarray]
    tests: list[tuple[float, ranks.Shift]]  # p and ratio, one a way


def _key(row: Row, by_impl: bool) -> str:
    if not by_impl:
        return row.cell
    plain: dict[str, Any] = msgspec.to_builtins(cell_of(row))
    return Cell(**{**plain, "impl": ""}).key


def _readings(a: Row, b: Row, foreign: set[str]) -> _Reading:
    """What two rows say of each other; ``foreign`` are the devices on which the machines differ."""
    impl = a.impl if a.impl == b.impl else f"{a.impl} > {b.impl}"
    cell = Compared(
        method=b.method, impl=impl, mode=b.mode, device=b.device, dtype=b.dtype, seq_len=b.seq_len, memory=b.memory,
        cell_a=a.cell, cell_b=b.cell, status_a=a.status, status_b=b.status,
    )  # fmt: skip
    objection = _objection("A", a) or _objection("B", b)
    left, right = processes(a), processes(b)
    cell.n_a, cell.n_b = len(left.medians), len(right.medians)
    cell.disturbed = " and ".join(name for name, side in (("A", left), ("B", right)) if side.disturbed)
    groups = [side.medians for row, side in ((a, left), (b, right)) if row.measured]
    if objection:
        cell.reason = objection
        return _Reading(cell, groups, [])
    cell.a_s, cell.b_s = float(np.median(left.medians)), float(np.median(right.medians))
    related = bool(left.references and right.references)
    if related:
        cell.speed = {
            kernel: float(np.median(right.references[kernel]) / np.median(left.references[kernel]))
            for kernel in KERNELS
        }
    other = a.device in foreign
    if other and not related:
        cell.reason = "the machines differ and the rows have no times of the reference kernels"
        return _Reading(cell, groups, [])
    cell.normalised = other or (related and _speed_changed(left, right, cell.speed))
    ways = [] if other else [(left.medians, right.medians)]
    if cell.normalised:
        ways += [(_in_units(left, kernel), _in_units(right, kernel)) for kernel in KERNELS]
    tests = [(ranks.rank_test(x, y), ranks.hodges_lehmann(x, y, CONFIDENCE)) for x, y in ways]
    if not cell.normalised and min(len(left.paces), len(right.paces)) >= LEAST_ADJUSTED:
        found = ranks.adjusted(left.medians, right.medians, left.paces, right.paces, CONFIDENCE)
        cell.adjusted, groups, tests = found.coefficient, [found.a, found.b], [(found.p, found.shift)]
    shifts = [shift for _, shift in tests]
    cell.p = max(p for p, _ in tests)
    # Between machines neither kernel is the truth: the middle of both, and what covers both intervals.
    cell.ratio = math.sqrt(shifts[0].ratio * shifts[1].ratio) if other else shifts[0].ratio
    hull = shifts if other else shifts[:1]
    cell.low, cell.high = min(shift.low for shift in hull), max(shift.high for shift in hull)
    cell.confidence = shifts[0].confidence
    if cell.confidence == 0.0 or not (cell.low > 0 and math.isfinite(cell.high)):
        cell.low = cell.high = cell.confidence = None
    return _Reading(cell, groups, tests)


def _speed_changed(a: Processes, b: Processes, speed: Mapping[str, float]) -> bool:
    """Whether a kernel changed by more than ``SPEED``, and by more than it scatters from process to process."""
    return any(
        abs(change - 1) > SPEED and ranks.rank_test(a.references[kernel], b.references[kernel]) <= SPEED_ALPHA
        for kernel, change in speed.items()
    )


def _objection(side: str, row: Row) -> str:
    """Why a row cannot be compared; empty where it can."""
    if not row.measured:
        return f"{side} is {row.status}" + (f": {row.reason.splitlines()[0]}" if row.reason else "")
    if row.gate is None or not row.gate.ok:
        return f"{side} was timed without a passed gate"
    if any(kind_of(warning) is Warn.CHECKSUM for warning in row.warnings):
        return f"{side} gave another output from process to process"
    return ""


def _in_units(side: Processes, kernel: str) -> np.ndarray:
    return np.asarray(side.medians / side.references[kernel])


def _decide(found: list[_Reading], floors: Mapping[str, noise.Floor]) -> None:
    """Adjust all tests together, then give every cell its verdict."""
    valid = [reading for reading in found if reading.tests]
    smallest = [ranks.smallest_p(reading.cell.n_a, reading.cell.n_b) for reading in valid]
    able = [reading for reading, can in zip(valid, ranks.testable(smallest, ALPHA), strict=True) if can]
    for reading, p in zip(able, ranks.holm([reading.cell.p or 0.0 for reading in able]), strict=True):
        reading.cell.p_holm = p
    for reading in valid:
        cell = reading.cell
        assert cell.ratio is not None
        assert cell.a_s is not None
        floor = floors.get(cell.device)
        cell.floor = None if floor is None else floor.at(cell.a_s)
        cell.verdict, cell.reason = _verdict(cell, [shift for _, shift in reading.tests], len(valid))


def _verdict(cell: Compared, shifts: list[ranks.Shift], cells: int) -> tuple[Verdict, str]:
    directions = {shift.ratio > 1 for shift in shifts}
    beyond = all(max(shift.ratio, 1 / shift.ratio) > 1 + (cell.floor or 0.0) for shift in shifts)
    speed = ", ".join(f"{kernel} x{change:.2f}" for kernel, change in cell.speed.items())
    equal = all(shift.low >= 1 / (1 + SAME) and shift.high <= 1 + SAME for shift in shifts)
    if cell.disturbed and cell.p_holm is not None:
        return Verdict.UNCLEAR, f"other work ran beside {cell.disturbed}: measure again on a quiet machine"
    if cell.p_holm is not None and cell.p_holm <= ALPHA and len(directions) == 1 and beyond:
        reason = f"in units of the reference kernels too ({speed})" if cell.normalised else ""
        return (Verdict.SLOWER if directions == {True} else Verdict.FASTER), reason
    if cell.confidence is not None and cell.confidence >= CONFIDENCE and equal and not cell.disturbed:
        return Verdict.SAME, f"the interval lies inside +-{100 * SAME:g} %"
    if cell.p_holm is None:
        needed = least_processes(cells)
        counts = counted(cell.n_b, "process")
        counts = f"{cell.n_a} and {counts}" if cell.n_a != cell.n_b else f"{counts} a side"
        over = f" over {cells} cells" if cells > 1 else ""
        beside = f"; other work ran beside {cell.disturbed}" if cell.disturbed else ""
        return Verdict.UNCLEAR, f"{counts} cannot reach {100 * ALPHA:g} %{over}; {needed} would{beside}"
    if cell.normalised:
        return Verdict.UNCLEAR, f"the reference kernels changed ({speed}): it may be the machine"
    if cell.p_holm <= ALPHA:
        return Verdict.UNCLEAR, f"inside the noise floor of {100 * (cell.floor or 0):.1f} %"
    return Verdict.UNCLEAR, f"neither a difference (p {cell.p_holm:.2g}) nor equality is shown"


def least_processes(cells: int) -> int:
    """Processes a side with which one cell among so many can be decided."""
    count = 1
    while ranks.smallest_p(count, count) > ALPHA / max(cells, 1):
        count += 1
    return count


def _machines(a: Side, b: Side, devices: set[str], normalise: bool) -> tuple[set[str], list[str]]:
    """Devices that are not the same on both sides.

    Raises:
        UserError: there are some, and they shall not be normalised.
    """
    if a.run.folder.resolve() == b.run.folder.resolve():
        return set(), []
    foreign, differing = set(), []
    for device in sorted(devices):
        one, other = noise.identity(a.run.info, device), noise.identity(b.run.info, device)
        if not one or not other:
            foreign.add(device)
            differing.append(f"the machine of {(a if not one else b).run.name} is unknown")
        elif one != other:
            foreign.add(device)
            names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            differing += [f"{name} {one.get(name)} and {other.get(name)}" for name in names]
    text = "; ".join(dict.fromkeys(differing))
    if foreign and not normalise:
        raise UserError(
            f"{a.name} and {b.name} are from different machines: {text}\n"
            "  --normalise compares them in units of the reference kernels, flagged as such\n"
            "  better: measure both on one machine"
        )
    return foreign, [
        f"different machines ({text}): all ratios are in units of the reference kernels"
    ] if foreign else []


def _floors(
    a: Side, b: Side, found: Iterable[_Reading]
) -> tuple[dict[str, noise.Floor], list[str]]:  # fmt: skip
    """The noise floor of every device: the larger of what the runs show inside themselves and what is stored."""
    floors, notes = {}, []
    cells: dict[str, list[tuple[float, list[float]]]] = {}
    for reading in found:
        for medians in filter(len, reading.groups):
            apart = noise.split_differences(medians)
            cells.setdefault(reading.cell.device, []).append((float(np.median(medians)), apart))
    for device, known in cells.items():
        stored = noise.load(noise.identity(a.run.info, device)) or noise.load(noise.identity(b.run.info, device))
        candidates = [floor for floor in (noise.build_floor(known), stored.floor if stored else None) if floor]
        if candidates:
            floors[device] = candidates[0].larger(candidates[-1])
        if stored is None and a.run.folder.resolve() != b.run.folder.resolve():
            notes.append(
                f"the noise floor of {device} knows only the spread inside each run: measure the same code twice, then "
                "`ctxbench compare A A2 --calibrate`"
            )
    return floors, notes


def software_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Versions that are not the same."""
    one, other = _versions(a), _versions(b)
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    shown = "; ".join(f"{name} {one.get(name, '?')} and {other.get(name, '?')}" for name in names)
    return [f"the software differs: {shown}"] if names else []


def _versions(info: Mapping[str, Any]) -> dict[str, Any]:
    versions, environment = dict(info.get("versions") or {}), info.get("environment") or {}
    versions |= versions.pop("packages", None) or {}
    git = environment.get("git") or {}
    found = {**versions, **({"commit": f"{git['commit'][:9]}{'+' if git.get('changed') else ''}"} if git else {})}
    return {name: value for name, value in found.items() if value}
