"""How good forecasts are: the largest lengths of a run are held out and forecast from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis.forecast import FITTED, Forecaster, latency
from ctxbench.analysis.processes import processes
from ctxbench.analysis.reserve import needed
from ctxbench.cost.roofline import Ceilings
from ctxbench.errors import UserError
from ctxbench.registry import Registry
from ctxbench.rows import Row, cell_of

LEAST_LEFT = 3  # lengths a series keeps


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out cell: measured and forecast seconds, and whether the interval held the measurement.

    ``steady_s`` is the measurement at the typical speed of the lengths it was forecast from; equal without a reference.
    ``reserve`` is what the forecast would have set aside, ``needed`` what the higher of both meters saw, in bytes.
    """

    cell: str
    method: str
    impl: str
    mode: str
    seq_len: int
    measured_s: float
    steady_s: float
    forecast_s: float
    low: float
    high: float
    power_law_s: float
    needed: int | None = None
    reserve: int | None = None

    @property
    def error(self) -> float:
        """Relative error of the forecast against what was measured."""
        return abs(self.forecast_s / self.measured_s - 1)

    @property
    def steady_error(self) -> float:
        """Relative error against the measurement at one speed of the machine."""
        return abs(self.forecast_s / self.steady_s - 1)

    @property
    def power_law_error(self) -> float:
        """Relative error of a power law through the same lengths."""
        return abs(self.power_law_s / self.measured_s - 1)


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Median relative error, and the share of measurements inside their 95 % intervals."""

    median_error: float
    coverage: float


class Holdout(msgspec.Struct, frozen=True, kw_only=True):
    """Forecasts against measurements. ``disturbed`` cells rest on processes beside which other work ran: no truth.

    ``median_error`` and ``coverage``, the share inside their intervals, are against the seconds as measured; ``steady``
    is the same pair against those at one speed of the machine, None where the rows have no reference.
    """

    held: int
    cells: list[HeldOut]
    disturbed: int
    median_error: float
    power_law_median_error: float
    coverage: float
    steady: Accuracy | None
    false_fits: int
    peaks: int


def holdout(rows: Sequence[Row], registry: Registry, ceilings: Ceilings, held: int = 1) -> Holdout:
    """Hold out the ``held`` largest lengths of every series that keeps at least three, and forecast them.

    Raises:
        UserError: no series of these rows is long enough.
    """
    series: dict[Any, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.seq_len):
        if row.measured:
            series[cell_of(row).series].append(row)
    targets: list[Row] = []
    noisy = 0
    for found in series.values():
        quiet = [row for row in found if not processes(row).disturbed]
        noisy += len(found) - len(quiet)
        if len(quiet) >= LEAST_LEFT + held:
            targets += quiet[-held:]
    first = {cell_of(row).series: row.seq_len for row in reversed(targets)}  # the shortest one held out
    kept = [row for found in series.values() for row in found if row.seq_len < first.get(cell_of(row).series, 2**62)]
    forecaster = Forecaster(registry, ceilings, kept)
    cells = [cell for row in targets if (cell := _held_out(row, forecaster)) is not None]
    if not cells:
        busy = f" ({noisy} rows rest on processes beside other work)" if noisy else ""
        raise UserError(
            f"no series has {LEAST_LEFT + held} undisturbed lengths and formulas, so nothing can be held out{busy}\n"
            "  accepted: a run over at least four lengths, on a quiet machine, such as `ctxbench run --seq 1k..16k`"
        )
    steady = None
    if forecaster.steady.coefficient is not None:
        steady = Accuracy(
            median_error=float(np.median([cell.steady_error for cell in cells])),
            coverage=float(np.mean([cell.low <= cell.steady_s <= cell.high for cell in cells])),
        )
    known = [cell for cell in cells if cell.needed is not None and cell.reserve is not None]
    return Holdout(
        held=held, cells=cells, disturbed=noisy,
        median_error=float(np.median([cell.error for cell in cells])),
        power_law_median_error=float(np.median([cell.power_law_error for cell in cells])),
        coverage=float(np.mean([cell.low <= cell.measured_s <= cell.high for cell in cells])), steady=steady,
        false_fits=sum((cell.reserve or 0) < (cell.needed or 0) for cell in known), peaks=len(known),
    )  # fmt: skip


def _held_out(row: Row, forecaster: Forecaster) -> HeldOut | None:
    found = forecaster.estimate(cell_of(row))
    if found.source != FITTED:
        return None
    assert found.latency_s is not None
    assert found.low is not None
    assert found.high is not None
    return HeldOut(
        cell=row.cell, method=row.method, impl=row.impl, mode=row.mode, seq_len=row.seq_len, measured_s=latency(row),
        steady_s=forecaster.steady.seconds(row), forecast_s=found.latency_s, low=found.low, high=found.high,
        power_law_s=found.power_law_s or 0.0,
        needed=needed(row), reserve=found.peak_at_most,
    )  # fmt: skip
