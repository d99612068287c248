"""How time grows with the length: one exponent where there is one, named regimes where there are several.

A curve is fitted in logarithms, each length weighted by how well its processes agree. Intervals are 95 % and come from
a hierarchical bootstrap: the processes of each length are resampled, then everything is fitted again. A line whose
slope changes on the way is not averaged: straight pieces are fitted, and each is a regime with its own exponent.

The exponent of the last lengths is that of a line through them, unless the curve bends and a sum of powers explains all
of it: then the exponent of that sum at the longest length, where a line would tell the middle of its lengths.

Every slope stands beside that of the formula, taken by the very same fit through the formula's values. Between two
lengths that is the mean of ``T f'(T) / f(T)`` over log T.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis.processes import PRIOR_DOF, moderated_variances, processes
from ctxbench.rows import Row, cell_of
from ctxbench.units import format_tokens

RESAMPLES, SEED = 2000, 20_2611
LEAST_SIGMA = 1e-3  # relative; agreement below this is luck, not knowledge
ALPHA = 0.01  # chance that a straight line is taken for two pieces
LEAST_CHANGE = 0.2  # of the exponent; every real curve bends by less
MOST_CHANGES = 2
LEAST_LENGTHS = 4  # below, no change of regime can be told from noise
TAIL = 4
POWERS = (0.0, 1.0, 1.5, 2.0)  # of the length, in a sum with weights that are not negative
BENT, FITTING = 0.05, 0.02  # chance that a line is taken for bent, and that a sum of powers is refused its own data


class Slope(msgspec.Struct, frozen=True, kw_only=True):
    """An exponent from ``first`` to ``last`` tokens, or at one length; ends are None where no length has two processes.

    ``formula`` is the exponent that the FLOPs by formula have there.
    """

    first: int
    last: int
    value: float
    low: float | None = None
    high: float | None = None
    formula: float | None = None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change of regime: the pieces meet near ``near`` tokens."""

    near: int
    before: float
    after: float


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """Growth of one series. ``overall`` is None where the exponent changes: then ``regimes`` has more than one."""

    method: str
    impl: str
    mode: str
    device: str
    dtype: str
    memory: int | None
    params: dict[str, Any]
    lengths: list[int]
    overall: Slope | None
    tail: Slope
    steps: list[Slope]
    regimes: list[Slope]
    changes: list[Change]

    @property
    def text(self) -> str:
        """``T^1.97 (1.95 to 1.99)``, or what it crosses over from and to."""
        if self.overall is not None:
            return power(self.overall)
        pieces = [power(self.regimes[0])]
        for change, regime in zip(self.changes, self.regimes[1:], strict=True):
            pieces.append(f"near {format_length(change.near)} crossing over to {power(regime)}")
        return ", ".join(pieces)

    @property
    def formula_text(self) -> str:
        """The exponents of the formula over the same pieces; empty without a formula."""
        known = [slope.formula for slope in self.regimes if slope.formula is not None]
        return ", ".join(f"T^{value:.2f}" for value in known) if len(known) == len(self.regimes) else ""


def power(slope: Slope) -> str:
    """``T^1.97 (1.95 to 1.99)``."""
    interval = f" ({slope.low:.2f} to {slope.high:.2f})" if slope.low is not None and slope.high is not None else ""
    return f"T^{slope.value:.2f}{interval}"


def format_length(tokens: float) -> str:
    """A length between measured ones, to two digits: ``1.4k``."""
    return format_tokens(round(tokens)) if tokens < 1024 else f"{tokens / 1024:.2g}k" if tokens < 102400 else (
        f"{tokens / 1024:.0f}k"
    )  # fmt: skip


def scalings(rows: Iterable[Row]) -> list[Scaling]:
    """Growth of every series with at least three measured lengths, in the order of the rows."""
    found: dict[Any, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.measured and len(processes(row).medians):
            found[cell_of(row).series][row.seq_len] = row
    return [_scaling([series[length] for length in sorted(series)]) for series in found.values() if len(series) >= 3]


def _scaling(rows: Sequence[Row]) -> Scaling:
    work = [work_of(row) for row in rows]
    formula = [float(value) for value in work if value]
    curve = Curve(
        [row.seq_len for row in rows], [processes(row).medians for row in rows],
        formula if len(formula) == len(rows) else None,
    )  # fmt: skip
    breaks = curve.breaks()
    regimes = curve.pieces(breaks)
    changes = [
        Change(near=round(math.exp(at)), before=before.value, after=after.value)
        for at, before, after in zip(breaks, regimes, regimes[1:], strict=False)
    ]
    first = rows[0]
    return Scaling(
        method=first.method, impl=first.impl, mode=first.mode, device=first.device, dtype=first.dtype,
        memory=first.memory, params=first.params, lengths=list(curve.lengths), overall=None if breaks else regimes[0],
        tail=curve.tail(breaks), steps=curve.steps(), regimes=regimes, changes=changes,
    )  # fmt: skip


def work_of(row: Row) -> int | None:
    """FLOPs of the impl by formula, else as counted."""
    if row.flops is None:
        return None
    return row.flops.formula if row.flops.formula is not None else row.flops.counted


class Curve:
    """Lengths, the seconds of every process at each, and optionally a formula's value at each."""

    def __init__(
        self, lengths: Sequence[int], seconds: Sequence[Sequence[float] | np.ndarray],
        formula: Sequence[float] | None = None,
    ):  # fmt: skip
        self.lengths = tuple(lengths)
        self.x = np.log(np.asarray(lengths, float))
        self.groups = [np.log(np.asarray(group, float)) for group in seconds]
        self.counts = np.array([len(group) for group in self.groups])
        self.y = np.array([group.mean() for group in self.groups])
        self.formula = None if formula is None else np.log(np.asarray(formula, float))
        variances, _ = moderated_variances(self.groups)
        self.replicated = bool(np.isfinite(variances).all())
        self.variances = np.maximum(variances, LEAST_SIGMA**2) if self.replicated else np.ones(len(self.groups))
        self._draws: np.ndarray | None = None

    def overall(self) -> Slope:
        """One exponent over all lengths, whether or not it is constant."""
        return self.pieces([])[0]

    def steps(self) -> list[Slope]:
        """The exponent between each length and the next."""
        return [self._line(np.arange(index, index + 2)) for index in range(len(self.lengths) - 1)]

    def tail(self, breaks: Sequence[float] = ()) -> Slope:
        """The exponent over the last lengths: four of six and more, else three, and only beyond the last change.

        A line through four lengths tells the exponent of their middle. Where they are bent, or a change was found, and
        a sum of powers fits all lengths as well as their scatter allows, it is the sum's exponent at the longest one.
        """
        size = len(self.lengths)
        count = TAIL if size >= 6 else TAIL - 1
        beyond = int((self.x >= max(breaks) - 1e-9).sum()) if breaks else count
        chosen = np.arange(size - max(2, min(count, beyond)), size)
        if size > len(POWERS) + 1 and (breaks or self._bent(chosen)):
            weights = self._powers(self.y)
            fitted = np.log(self._basis() @ weights)
            if self._misfit(fitted, np.arange(size), int((weights > 0).sum()), breaks) >= FITTING:
                return self._end(weights)
        return self._line(chosen)

    def _basis(self) -> np.ndarray:
        """Powers of the length over the longest one, [lengths, powers]."""
        return np.asarray(np.exp(self.x - self.x[-1])[:, None] ** np.array(POWERS))

    def _powers(self, y: np.ndarray) -> np.ndarray:
        """Weights of the powers that fit ``exp(y)`` with least relative error; none is negative."""
        from scipy.optimize import nnls

        root = np.sqrt(self._weights())
        weights, _ = nnls(self._basis() * (root / np.exp(y))[:, None], root)
        return np.asarray(weights)

    def _end(self, weights: np.ndarray) -> Slope:
        """The exponent of a sum of powers at the longest length.

        Its interval is that of all powers, also of those that the data left at 0: they might have had a weight.
        """
        basis, powers = self._basis(), np.array(POWERS)
        value = float(powers @ weights / weights.sum())
        root = np.sqrt(self._weights())
        moves = np.linalg.pinv(basis * (root / (basis @ weights))[:, None]) * root  # of the weights, by log seconds
        row = (powers - value) / weights.sum() @ moves
        known = None
        if self.formula is not None:
            own = self._powers(self.formula)
            known = float(powers @ own / own.sum())
        every = np.arange(len(self.x))
        return self._slope(row, every, self.lengths[-1], self.lengths[-1], value, known)

    def _bent(self, chosen: np.ndarray) -> bool:
        """Whether these lengths do not lie on a line, where no change was found."""
        fitted = self._design([], chosen) @ (self._solver([], chosen) @ self.y[chosen])
        return self._misfit(fitted, chosen, 2, []) < BENT

    def _misfit(self, fitted: np.ndarray, chosen: np.ndarray, parameters: int, breaks: Sequence[float]) -> float:
        """Chance of residuals this large if the fit were true, against the scatter about the pieces (F test)."""
        from scipy.special import fdtrc

        freedom = (int(self.counts.sum()) if self.replicated else len(self.x)) - 2 - 2 * len(breaks)
        spare = len(chosen) - parameters
        if freedom < 1 or spare < 1:
            return 1.0
        squares = float((self._weights()[chosen] * (self.y[chosen] - fitted) ** 2).sum())
        noise = max(self._residual(breaks) / freedom, 1e-300)
        return float(fdtrc(spare, freedom, squares / spare / noise))

    def pieces(self, breaks: Sequence[float]) -> list[Slope]:
        """Exponents of the straight pieces that meet at ``breaks`` (log tokens), fitted together."""
        solve = self._solver(breaks, np.arange(len(self.x)))
        bounds = [self.x[0], *breaks, self.x[-1]]
        rows = [solve[1 : index + 2].sum(axis=0) for index in range(len(breaks) + 1)]
        return [
            self._slope(row, np.arange(len(self.x)), math.exp(low), math.exp(high))
            for row, low, high in zip(rows, bounds, bounds[1:], strict=False)
        ]

    def breaks(self) -> list[float]:
        """Where the exponent changes, in log tokens: as many changes as the scatter of the processes proves.

        A further change must lower the residuals by more than chance would (F test, divided by the number of places
        that were tried) and alter the exponent by ``LEAST_CHANGE``. Scatter of the lengths about the pieces counts as
        noise too, so a curve that zigzags has no regimes.
        """
        from scipy.special import fdtrc

        count = len(self.x)
        if count < LEAST_LENGTHS:
            return []
        inner = self.x[1:-1]
        places = np.sort(np.concatenate([inner, (inner[1:] + inner[:-1]) / 2]))
        apart = float(np.diff(self.x).min()) - 1e-9  # a piece must hold a whole step
        found: list[float] = []
        residual = self._residual(found)
        for changes in range(1, MOST_CHANGES + 1):
            tried = [
                list(chosen)
                for chosen in itertools.combinations(places.tolist(), changes)
                if all(b - a >= apart for a, b in itertools.pairwise(chosen))
            ]
            freedom = (int(self.counts.sum()) if self.replicated else count) - 2 - 2 * changes
            if not tried or freedom < 1 or count < 2 + 2 * changes:
                break
            best = min(tried, key=self._residual)
            lower = self._residual(best)
            ratio = (residual - lower) / max(lower / freedom, 1e-300)
            slopes = [piece.value for piece in self.pieces(best)]
            bends = min(abs(after - before) for before, after in itertools.pairwise(slopes))
            if fdtrc(1, freedom, ratio) * len(tried) > ALPHA or bends < LEAST_CHANGE:
                break
            found, residual = best, lower
        return found

    def _residual(self, breaks: Sequence[float]) -> float:
        """Weighted squares about the pieces: of the processes about their length's mean, and of the means."""
        every = np.arange(len(self.x))
        fitted = self._design(breaks, every) @ (self._solver(breaks, every) @ self.y)
        within = 0.0
        if self.replicated:
            within = sum(
                float(((g - g.mean()) ** 2).sum() / v) for g, v in zip(self.groups, self.variances, strict=True)
            )
        return within + float((self._weights() * (self.y - fitted) ** 2).sum())

    def _weights(self) -> np.ndarray:
        return np.asarray(self.counts / self.variances)

    def _design(self, breaks: Sequence[float], chosen: np.ndarray) -> np.ndarray:
        x = self.x[chosen]
        return np.stack([np.ones_like(x), x, *(np.maximum(x - at, 0.0) for at in breaks)], axis=1)

    def _solver(self, breaks: Sequence[float], chosen: np.ndarray) -> np.ndarray:
        """The matrix that takes values to the coefficients of the weighted fit."""
        design, root = self._design(breaks, chosen), np.sqrt(self._weights()[chosen])
        return np.asarray(np.linalg.pinv(design * root[:, None]) * root)

    def _line(self, chosen: np.ndarray) -> Slope:
        row = self._solver([], chosen)[1]
        return self._slope(row, chosen, self.lengths[chosen[0]], self.lengths[chosen[-1]])

    def _slope(
        self, row: np.ndarray, chosen: np.ndarray, first: float, last: float,
        value: float | None = None, formula: float | None = None,
    ) -> Slope:  # fmt: skip
        """A slope as the linear function ``row`` of the values, or with the gradient ``row`` about ``value``."""
        from scipy.special import ndtri, stdtrit

        linear = float(row @ self.y[chosen])
        value = linear if value is None else value
        low = high = None
        every = int((self.counts - 1).sum())
        freedom = min(int((self.counts[chosen] - 1).sum()) + PRIOR_DOF, every)
        if self.replicated:
            # A few processes know their own spread badly: wider by the quantile of t over that of the normal.
            wider = float(stdtrit(freedom, 0.975) / ndtri(0.975))
            ends = np.quantile(self._bootstrap()[:, chosen] @ row, (0.025, 0.975))
            low, high = (float(value + wider * (end - linear)) for end in ends)
        if formula is None and self.formula is not None:
            formula = float(row @ self.formula[chosen])
        return Slope(first=round(first), last=round(last), value=value, low=low, high=high, formula=formula)

    def _bootstrap(self) -> np.ndarray:
        """Means of every length with its processes resampled, [resamples, lengths].

        The deviations of a length are scaled to its moderated variance: resampling three values as they are is too
        narrow. A length whose processes show no spread of their own, or has one process, borrows the others' shape.
        """
        if self._draws is None:
            generator = np.random.default_rng(SEED)
            unit = [
                (group - group.mean()) / group.std() if len(group) > 1 and group.std() > 1e-9 else None
                for group in self.groups
            ]
            known = [part for part in unit if part is not None]
            common = np.concatenate(known) if known else np.array([-1.0, 1.0])
            columns = []
            for mean, part, size, variance in zip(self.y, unit, self.counts, self.variances, strict=True):
                pool = common if part is None else part
                drawn = pool[generator.integers(0, len(pool), (RESAMPLES, size))].mean(axis=1)
                columns.append(mean + math.sqrt(variance) * drawn)
            self._draws = np.stack(columns, axis=1)
        return self._draws
