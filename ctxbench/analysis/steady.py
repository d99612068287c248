"""What calls would have taken at one speed of the machine: the typical one of the run.

On a shared host the speed changes from second to second. The product timed between the samples (``processes.pace``)
says how slow the machine was for each process; how far a call follows it is one coefficient of the whole run, from
processes of the same cell alone: it knows no length, no method and no forecast, so it can favour none.

What a process far from the typical speed says is less certain, because calls follow the product unequally: its weight
falls with the distance.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ctxbench.analysis.processes import processes
from ctxbench.rows import Row

LEAST_PAIRS = 8  # processes beyond the first of their cell; fewer know no coefficient
UNEQUAL = 0.35  # deviation of the coefficient from call to call, where a shared two-core machine slowed them by half
LEAST_NOISE = 0.02  # between processes at one speed


class Steady:
    """Seconds of rows at the typical speed of their run; rows without the reference are taken as they are.

    coefficient: the share of a change of the reference that a call follows, from 0 to 1; None where too few processes
    timed the reference. noise: deviation of the logarithms of processes at one speed. movement: by how much, in
    logarithms, the speed of the machine moved 19 of 20 rows at most.
    """

    def __init__(self, rows: Iterable[Row]):
        paces: dict[Any, list[float]] = defaultdict(list)
        apart: list[np.ndarray] = []
        known = [row for row in rows if len(processes(row).paces)]
        for row in known:
            found = processes(row)
            paces[row.device, row.threads].extend(found.paces)
            apart.append(np.stack([_centred(found.paces), _centred(np.log(found.medians))]))
        changes, times = np.concatenate(apart, axis=1) if apart else np.empty((2, 0))
        enough = sum(part.shape[1] - 1 for part in apart) >= LEAST_PAIRS
        self.coefficient = min(max(slope(changes, times), 0.0), 1.0) if enough else None
        self.noise = LEAST_NOISE
        if self.coefficient is not None:
            left = np.abs(times - self.coefficient * changes)
            self.noise = max(LEAST_NOISE, 1.4826 * float(np.median(left[left > 0])) if left.any() else 0.0)
        self._typical = {key: float(np.median(found)) for key, found in paces.items()}
        moved = [abs(math.log(row.latency_s.median / self.seconds(row))) for row in known if row.latency_s]
        self.movement = float(np.quantile(moved, 0.95)) if moved else 0.0

    def off(self, row: Row) -> np.ndarray:
        """How slow the machine was for each process: log of the reference over its typical time; empty if unknown."""
        found, typical = processes(row).paces, self._typical.get((row.device, row.threads))
        return found - typical if self.coefficient is not None and typical is not None else np.empty(0)

    def medians(self, row: Row) -> np.ndarray:
        """Seconds a call of each process at the typical speed."""
        found, off = processes(row).medians, self.off(row)
        return found * np.exp(-(self.coefficient or 0.0) * off) if len(off) else found

    def seconds(self, row: Row) -> float:
        """Seconds of one call of a measured row at the typical speed: the weighted geometric mean of its processes."""
        assert row.latency_s is not None
        off = self.off(row)
        if not len(off):
            return row.latency_s.median
        return math.exp(float(np.average(np.log(self.medians(row)), weights=self.weights(off))))

    def interval(self, row: Row) -> tuple[float, float]:
        """The row's interval at the typical speed: the range of few processes, else its own, moved."""
        assert row.latency_s is not None
        low, high = row.latency_s.low, row.latency_s.high
        if not len(self.off(row)):
            return low, high
        found, here = self.medians(row), self.seconds(row)
        if 1 < len(found) < 5:
            return float(found.min()), float(found.max())
        return low * here / row.latency_s.median, high * here / row.latency_s.median

    def weights(self, off: np.ndarray) -> np.ndarray:
        """Certainty of processes this far from the typical speed: one over the variance of their logarithm."""
        found: np.ndarray = 1 / (self.noise**2 + (UNEQUAL * off) ** 2)
        return found


def slope(changes: Sequence[float] | np.ndarray, times: Sequence[float] | np.ndarray) -> float:
    """The line through the origin of least absolute deviations: the median of the ratios, weighted by the changes."""
    x, y = np.asarray(changes, float), np.asarray(times, float)
    x, y = x[x != 0], y[x != 0]
    if not len(x):
        return 0.0
    order = np.argsort(y / x)
    reached = np.cumsum(np.abs(x[order]))
    return float((y / x)[order][np.searchsorted(reached, reached[-1] / 2)])


def _centred(values: np.ndarray) -> np.ndarray:
    centred: np.ndarray = values - values.mean()
    return centred
