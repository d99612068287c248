"""Where one method becomes faster than another, with a 90 % interval, for every memory size both were measured at.

Between measured lengths a curve is straight in logarithms. The interval is a bootstrap: each length's mean of log
process medians is redrawn with the variance of its processes, which is drawn towards the common one, and every redrawn
pair of curves is asked where it crosses. Beyond the longest common length, the fits of both methods may cross: that is
a forecast, its interval is where their own intervals part, and it is marked as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from ctxbench.analysis.curves import Curve
from ctxbench.analysis.forecast import FAR, FITTED, Forecaster, disturbed
from ctxbench.analysis.processes import moderated_variances, processes
from ctxbench.rows import cell_of

DRAWS, SEED = 2000, 20_2611
LEVEL = 0.90
MEASURED, FORECAST, NONE = "measured", "forecast", "none"
PER_OCTAVE = 8  # lengths a forecast crossing is looked for at


class Crossover(msgspec.Struct, frozen=True, kw_only=True):
    """``a`` is faster up to ``seq_len``, ``b`` beyond it. An end of the interval that is None lies outside the range.

    source: ``measured``, ``forecast``, or ``none`` where one of both, named in ``a``, is faster at every length.
    first, last: the shortest and longest length the statement rests on. chance: share of redrawn pairs that cross.
    """

    a: str
    b: str
    memory_a: int | None
    memory_b: int | None
    mode: str
    source: str
    first: int
    last: int
    seq_len: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None


def crossovers(left: Sequence[Curve], right: Sequence[Curve], forecaster: Forecaster | None = None) -> list[Crossover]:
    """All crossings of the curves of two methods.

    Curves of one setting meet; where both have several memory sizes, only equal sizes do.
    """
    sizes = [{curve.memory for curve in side} for side in (left, right)]
    equal = min(map(len, sizes)) > 1
    found: list[Crossover] = []
    for a, b in itertools.product(left, right):
        if a.setting == b.setting and (not equal or a.memory == b.memory):
            found += _pair(a, b, forecaster)
    return found


def _pair(a: Curve, b: Curve, forecaster: Forecaster | None) -> list[Crossover]:
    rows_a, rows_b = ({row.seq_len: row for row in curve.rows} for curve in (a, b))
    common = sorted(rows_a.keys() & rows_b.keys())
    quiet = [length for length in common if not disturbed(rows_a[length]) and not disturbed(rows_b[length])]
    lengths = quiet if len(quiet) >= 2 else common
    if len(lengths) < 2:
        return []
    sides = [[processes(rows[length]).medians for length in lengths] for rows in (rows_a, rows_b)]
    means = [np.array([np.log(group).mean() for group in groups]) for groups in sides]
    difference = means[1] - means[0]  # above 0: a is faster
    draws = _redrawn(sides)
    x = np.log(np.asarray(lengths, float))
    found = []
    for index in np.flatnonzero(difference[:-1] * difference[1:] < 0):
        rising = bool(difference[index + 1] > difference[index])
        at = _zero(x, difference, int(index))
        low, high, chance = _interval(x, difference + draws, at, rising)
        before, after = (b, a) if rising else (a, b)
        ends = {"low": low, "high": high, "chance": chance}
        found.append(_crossover(before, after, lengths, MEASURED, seq_len=math.exp(at), **ends))
    if found:
        return found
    faster, slower = (a, b) if difference[-1] > 0 else (b, a)
    ahead = _ahead(faster, slower, lengths, forecaster) if forecaster else None
    return [ahead or _crossover(faster, slower, lengths, NONE)]


def _crossover(before: Curve, after: Curve, lengths: Sequence[int], source: str, **found: float | None) -> Crossover:
    return Crossover(
        a=f"{before.method} / {before.impl}", b=f"{after.method} / {after.impl}", memory_a=before.memory,
        memory_b=after.memory, mode=before.setting["mode"], source=source, first=lengths[0], last=lengths[-1], **found,
    )  # fmt: skip


def _redrawn(sides: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """What redrawing adds to the difference of both curves, [draws, lengths]."""
    generator = np.random.default_rng(SEED)
    total = np.zeros((DRAWS, len(sides[0])))
    for groups in sides:
        logs = [np.log(group) for group in groups]
        variances, freedom = moderated_variances(logs)
        if not np.isfinite(variances).all():  # one process each: nothing is known of their spread
            variances, freedom = np.zeros(len(logs)), np.ones(len(logs))
        counts = np.array([len(group) for group in logs])
        drawn = generator.standard_t(np.maximum(freedom, 1), size=(DRAWS, len(logs)))
        total += drawn * np.sqrt(variances / counts)
    return total


def _zero(x: np.ndarray, y: np.ndarray, index: int) -> float:
    return float(x[index] - y[index] * (x[index + 1] - x[index]) / (y[index + 1] - y[index]))


def _interval(x: np.ndarray, redrawn: np.ndarray, at: float, rising: bool) -> tuple[float | None, float | None, float]:
    """Ends of the interval and the share of curves that cross in this direction at all.

    A redrawn pair that crosses nowhere crosses before the first length where it has the later sign throughout, and
    after the last one otherwise.
    """
    sign = 1.0 if rising else -1.0
    values = redrawn * sign
    ups = (values[:, :-1] < 0) & (values[:, 1:] >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        places = x[:-1] - values[:, :-1] * np.diff(x) / np.diff(values, axis=1)
    places = np.where(ups, places, np.inf)
    nearest = np.take_along_axis(places, np.abs(places - at).argmin(axis=1)[:, None], axis=1)[:, 0]
    nearest = np.where(ups.any(axis=1), nearest, np.where(values[:, -1] >= 0, -np.inf, np.inf))
    low, high = np.quantile(nearest, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    ends = (math.exp(end) if np.isfinite(end) else None for end in (low, high))
    return next(ends), next(ends), float(ups.any(axis=1).mean())


def _ahead(faster: Curve, slower: Curve, lengths: Sequence[int], forecaster: Forecaster) -> Crossover | None:
    """A crossing of both fits beyond the data; None where they do not cross within what fits are good for."""
    last = lengths[-1]
    estimates: list[Callable[[int], tuple[float, float, float] | None]] = [
        _times(curve, forecaster) for curve in (faster, slower)
    ]
    grid = [round(last * 2 ** (step / PER_OCTAVE)) for step in range(1, int(math.log2(FAR)) * PER_OCTAVE + 1)]
    crossing = low = high = None
    for length in grid:
        a, b = (estimate(length) for estimate in estimates)
        if a is None or b is None:
            return None
        if low is None and b[0] < a[2]:
            low = length
        if crossing is None and b[1] < a[1]:
            crossing = length
        if high is None and b[2] < a[0]:
            high = length
    if crossing is None:
        return None
    return _crossover(
        faster, slower, lengths, FORECAST, seq_len=float(crossing), low=None if low == grid[0] else low, high=high
    )


def _times(curve: Curve, forecaster: Forecaster) -> Callable[[int], tuple[float, float, float] | None]:
    cell = cell_of(curve.rows[-1])

    def estimate(length: int) -> tuple[float, float, float] | None:
        found = forecaster.estimate(msgspec.structs.replace(cell, seq_len=length))
        if found.latency_s is None or found.low is None or found.high is None:
            return None
        return (found.low, found.latency_s, found.high) if found.source in (FITTED, MEASURED) else None

    return estimate
