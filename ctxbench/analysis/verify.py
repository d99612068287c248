"""Does a run repeat? Random cells, measured again in fresh processes, against the interval the run implies for them.

The interval of a row says where its own median is uncertain. A second measurement is uncertain too, so what it must
fall into is the prediction interval: with n processes then and m now, the geometric mean of process medians is expected
within t * s * sqrt(1 / n + 1 / m), in logarithms, in 95 % of cases. Where an A/A calibration of this machine is stored
(``ctxbench compare A A2 --calibrate``), its noise floor is added, because one run cannot know how runs differ.

Where both sides timed the reference product beside their samples, the expected interval is that of the machine's speed
now: spreads are those at one speed (``analysis.steady``), and the middle moves by the coefficient times what the
reference changed, which is as uncertain as calls follow it unequally. The interval without the reference stands beside.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis import noise
from ctxbench.analysis.compare import SPEED
from ctxbench.analysis.processes import KERNELS, moderated_variances, processes
from ctxbench.analysis.runs import Run
from ctxbench.analysis.steady import UNEQUAL, Steady
from ctxbench.errors import UserError
from ctxbench.rows import FAILURES, Row

CONFIDENCE = 0.95
NORMAL = 1.96  # deviations that hold as much of a normal distribution
ALPHA = 0.01  # chance of rejecting a run whose intervals are right


class Repeat(msgspec.Struct, kw_only=True):
    """One cell, then and now. Seconds are geometric means of process medians; ``low`` to ``high`` is expected now.

    ``inside`` is None where there is nothing to judge: not measured now, or no spread known. ``disturbed``: other work
    ran on the machine then or now, so the cell is shown but proves nothing. ``speed`` is what the reference beside the
    samples took now over then; None without one, and then ``raw_low`` to ``raw_high``, which take no account of it, are
    ``low`` to ``high``. ``same_peak`` says whether the allocator's peak is the same byte count.
    """

    cell: str
    method: str
    impl: str
    mode: str
    dtype: str
    seq_len: int
    memory: int | None
    status: str
    then_s: float
    low: float | None = None
    high: float | None = None
    now_s: float | None = None
    n_then: int = 0
    n_now: int = 0
    inside: bool | None = None
    speed: float | None = None
    raw_low: float | None = None
    raw_high: float | None = None
    raw_inside: bool | None = None
    disturbed: bool = False
    same_peak: bool | None = None
    reason: str = ""


class Verification(msgspec.Struct, kw_only=True):
    """All repeated cells; ``judged`` are those of which there is something to say.

    ``p`` is the chance of so many outside where every interval is right. ``raw_inside`` counts those inside without
    the reference beside the samples; None where no cell has one.
    """

    run: str
    again: str
    seed: int
    cells: list[Repeat]
    judged: int
    inside: int
    p: float
    raw_inside: int | None = None
    floor: float | None = None

    @property
    def failed(self) -> bool:
        """More outside than 95 % intervals explain, or a cell that had a number and now fails."""
        return self.p < ALPHA or any(cell.status in FAILURES for cell in self.cells)


def choose(run: Run, count: int, seed: int) -> list[Row]:
    """Random measured rows of a run; all of them where it has no more.

    Raises:
        UserError: the run has no measured row.
    """
    measured = sorted((row for row in run.rows if len(_counted(row))), key=lambda row: row.cell)
    if not measured:
        raise UserError(f"{run.name} has no measured cell to repeat\n  `ctxbench show {run.folder}` lists its rows")
    return sorted(random.Random(seed).sample(measured, min(count, len(measured))), key=lambda row: row.seq_len)


def check_machine(then: Run, info: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Refuse to repeat on another machine.

    Raises:
        UserError: names both machines.
    """
    for device in sorted({row.device for row in rows}):
        one, other = noise.identity(then.info, device), noise.identity(info, device)
        if one and other and one != other:
            names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            shown = "; ".join(f"{name} {one.get(name)}, here {other.get(name)}" for name in names)
            raise UserError(
                f"{then.name} was measured on another machine: {shown}\n"
                "  measure here and use `ctxbench compare --normalise` instead"
            )


def verify(then: Run, chosen: Sequence[Row], again: Sequence[Row], folder: str, seed: int) -> Verification:
    """Judge rows that were measured again against those of the run."""
    model = _Model(then)
    present = {row.cell: row for row in again}
    stored = noise.load(noise.identity(then.info, chosen[0].device))
    floor = stored.floor if stored else None
    cells = [_repeat(row, present.get(row.cell), model, floor) for row in chosen]
    judged = [cell for cell in cells if cell.inside is not None and not cell.disturbed]
    outside = sum(not cell.inside for cell in judged)
    return Verification(
        run=then.name, again=folder, seed=seed, cells=cells, judged=len(judged), inside=len(judged) - outside,
        p=_at_least(outside, len(judged)), floor=floor.overall if floor else None,
        raw_inside=sum(bool(cell.raw_inside) for cell in judged) if any(cell.speed for cell in judged) else None,
    )  # fmt: skip


def prediction(
    medians: np.ndarray, variance: float, freedom: int, count: int, floor: float = 0.0, moved: float = 0.0,
    doubt: float = 0.0,
) -> tuple[float, float] | None:  # fmt: skip
    """Where the geometric mean of ``count`` further process medians is expected; None without a known spread.

    ``moved`` is by how much the machine's speed moves the logarithm, ``doubt`` the deviation of that.
    """
    from scipy.special import stdtrit

    if not math.isfinite(variance) or not freedom or not count:
        return None
    spread = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(variance * (1 / len(medians) + 1 / count))
    width = math.hypot(spread, NORMAL * doubt) + math.log1p(floor)
    centre = float(np.log(medians).mean()) + moved
    return math.exp(centre - width), math.exp(centre + width)


class _Model:
    """What a run says of the spread of its processes, as measured and at one speed of the machine."""

    def __init__(self, run: Run):
        measured = [row for row in run.rows if len(_counted(row))]
        self.steady = Steady(measured)
        self._raw = _spreads(measured, [_counted(row) for row in measured])
        self._steady = _spreads(measured, [self.steady.medians(row) for row in measured])

    def expected(self, then: Row, count: int, floor: float) -> tuple[float, float] | None:
        """The interval of ``count`` processes that takes no account of the machine's speed."""
        return prediction(_counted(then), *self._raw[then.cell], count, floor)

    def expected_now(self, then: Row, now: Row, floor: float) -> tuple[float, tuple[float, float] | None] | None:
        """What the reference took now over then, and the interval at that speed; None without a reference."""
        before, after = self.steady.off(then), self.steady.off(now)
        if not len(before) or not len(after) or self.steady.coefficient is None:
            return None
        change = float(after.mean() - before.mean())
        found = prediction(
            _counted(then), *self._steady[then.cell], len(after), floor, self.steady.coefficient * change,
            UNEQUAL * change,
        )  # fmt: skip
        return math.exp(change), found


def _spreads(rows: Sequence[Row], medians: Sequence[np.ndarray]) -> dict[str, tuple[float, int]]:
    """Variance of the logarithms of each row's process medians, and its degrees of freedom."""
    variances, freedom = moderated_variances([np.log(values) for values in medians])
    return {row.cell: (float(v), int(f)) for row, v, f in zip(rows, variances, freedom, strict=True)}


def _repeat(then: Row, now: Row | None, model: _Model, floor: noise.Floor | None) -> Repeat:
    before = processes(then)
    found = Repeat(
        cell=then.cell, method=then.method, impl=then.impl, mode=then.mode, dtype=then.dtype, seq_len=then.seq_len,
        memory=then.memory, status=now.status if now else "absent", then_s=_centre(before.medians),
        n_then=len(before.medians),
    )  # fmt: skip
    if now is None:
        found.reason = "the installed method plans no such cell, or the run was interrupted"
        return found
    if not now.measured:
        found.reason = now.reason.splitlines()[0] if now.reason else ""
        return found
    after = processes(now)
    found.now_s, found.n_now = _centre(after.medians), len(after.medians)
    found.disturbed = before.disturbed or after.disturbed
    if then.peak_bytes and now.peak_bytes and None not in (then.peak_bytes.allocated, now.peak_bytes.allocated):
        found.same_peak = then.peak_bytes.allocated == now.peak_bytes.allocated
    added = floor.at(found.then_s) if floor else 0.0
    expected = model.expected(then, found.n_now, added)
    if expected is None:
        found.reason = "no cell of the run has two processes, so its spread is unknown"
        return found
    found.raw_low, found.raw_high = expected
    at_speed = model.expected_now(then, now, added)
    if at_speed is not None and at_speed[1] is not None:
        found.speed, expected = at_speed[0], at_speed[1]
    found.low, found.high = expected
    found.inside = found.low <= found.now_s <= found.high
    found.raw_inside = found.raw_low <= found.now_s <= found.raw_high
    if found.disturbed:
        times = [time for time, side in (("then", before), ("now", after)) if side.disturbed]
        found.reason = f"other work ran beside it {' and '.join(times)}: not judged"
    elif not found.inside and before.references and after.references:
        changes = {k: float(np.median(after.references[k]) / np.median(before.references[k])) for k in KERNELS}
        if any(abs(change - 1) > SPEED for change in changes.values()):
            shown = ", ".join(f"{kernel} x{change:.2f}" for kernel, change in changes.items())
            found.reason = f"the machine runs its reference kernels at another speed: {shown}"
    return found


def _centre(medians: np.ndarray) -> float:
    return float(np.exp(np.log(medians).mean()))


def _at_least(outside: int, count: int) -> float:
    """Chance of so many or more outside when each interval is missed in 5 %."""
    from scipy.special import bdtrc

    return float(bdtrc(outside - 1, count, 1 - CONFIDENCE)) if outside else 1.0


def _counted(row: Row) -> np.ndarray:
    """Process medians of a measured row; none of any other."""
    return processes(row).medians if row.measured else np.empty(0)
