"""Forecasts from a run, or from nothing but a device: time with a 95 % interval, and a bound on memory.

A cell that was measured is answered by its row. Else, two finished lengths of its series are enough for the fit of
``analysis.fit``; with one, the plan's own forecast scales it; with none, the roofline of the device answers, and says
so in ``basis``.

The interval comes from leaving lengths out: every series is fitted again on its first two, three, ... lengths, and the
relative errors of what follows, divided by the root of the octaves ahead, are its scatter. Few lengths know their own
scatter badly, so it is drawn towards that of all series of the run and enlarged by the quantile of t. No interval is
narrower than what 19 of 20 of the run's errors stay below, because errors have longer tails than a normal law.

Where the rows timed the reference product beside their samples, every time is that at the run's typical speed of the
machine (``analysis.steady``): a slow second of the host is no property of a length. By how far that speed moved what
the run measured, the intervals are wider.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis import reserve
from ctxbench.analysis.fit import LEAST_LENGTHS, Fit, Terms, cost_terms, fit, power_law
from ctxbench.analysis.steady import Steady
from ctxbench.cell import Cell
from ctxbench.cost import roofline
from ctxbench.cost.figures import Evaluator, Figures
from ctxbench.cost.model import big_o
from ctxbench.cost.roofline import Ceilings, Point
from ctxbench.method import Method
from ctxbench.plan import Planned, resident_bytes
from ctxbench.registry import Registry
from ctxbench.rows import Row, cell_of
from ctxbench.units import counted, format_seconds, format_tokens

MEASURED, FITTED, SCALED, ROOFLINE, UNKNOWN = "measured", "fit", "scaled", "roofline", "unknown"
SCATTER = 0.12  # relative, an octave ahead; where no series of the run can tell its own
LEAST_SCATTER = 0.02
PRIOR_DOF = 4  # weight of the common scatter against that of one series
CUDA_CONTEXT_BYTES = 2**30  # driver context, kernels and the caching allocator's rounding
FAR = 8  # times the longest measured length, beyond which nobody has checked a fit
TOLD = 0.02  # a measured time that the machine's speed moves by more is shown as measured, too


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one cell. ``source`` says how: measured, fit, scaled, roofline, unknown.

    ``low`` and ``high`` bound the time with 95 %; for a roofline they are the bound of the hardware and three times
    the middle. ``as_measured_s`` is the row's own median where ``latency_s`` is that at the run's typical speed.
    ``power_law_s`` is what a power law through the same lengths says. ``peak_bytes`` is the likely peak,
    ``peak_at_most`` what to reserve. ``evidence`` are the keys of the cells behind it.
    """

    cell: str
    method: str
    impl: str
    mode: str
    device: str
    dtype: str
    seq_len: int
    memory: int | None
    source: str
    basis: str
    latency_s: float | None = None
    low: float | None = None
    high: float | None = None
    as_measured_s: float | None = None
    power_law_s: float | None = None
    peak_bytes: int | None = None
    peak_at_most: int | None = None
    state_bytes: int | None = None
    evidence: list[str] = []


class _Series:
    """The finished lengths of one series, with their terms and the fit through them."""

    def __init__(self, rows: Sequence[Row], terms: Sequence[Terms | None], steady: Steady):
        order = sorted(range(len(rows)), key=lambda index: rows[index].seq_len)
        pairs = [(rows[index], terms[index]) for index in order]
        quiet = [pair for pair in pairs if not disturbed(pair[0])]
        pairs = quiet if len(quiet) >= LEAST_LENGTHS else pairs
        self.disturbed = len(quiet) < LEAST_LENGTHS
        self.rows = [row for row, _ in pairs]
        self.seconds = [steady.seconds(row) for row in self.rows]
        self.lengths = [row.seq_len for row in self.rows]
        known = [term for _, term in pairs if term is not None]
        self.terms = known if len(known) == len(pairs) else []
        self.fit: Fit | None = fit(self.terms, self.seconds) if len(self.terms) >= LEAST_LENGTHS else None

    def errors(self) -> list[float]:
        """Log errors of every length from the shorter ones, divided by the root of the octaves ahead."""
        found = []
        for count in range(LEAST_LENGTHS, len(self.terms)):
            earlier = fit(self.terms[:count], self.seconds[:count])
            for index in range(count, len(self.terms)):
                octaves = math.log2(self.lengths[index] / self.lengths[count - 1])
                wrong = math.log(self.seconds[index] / earlier.predict(self.terms[index]))
                found.append(wrong / math.sqrt(octaves))
        return found


class Forecaster:
    """Answers for any cell, from the rows of runs of one machine and the ceilings of a device."""

    def __init__(self, registry: Registry, ceilings: Ceilings, rows: Iterable[Row] = (), basis: str = ""):
        self.registry, self.ceilings, self.basis = registry, ceilings, basis
        self._evaluator = Evaluator()
        self._answers: dict[str, Estimate] = {}
        self._figures: dict[str, Figures | None] = {}
        self._growths: dict[Any, str | None] = {}
        self._rows: dict[Any, dict[int, Row]] = defaultdict(dict)
        measured = [row for row in rows if row.measured]
        self.steady = Steady(measured)
        for row in measured:
            self._rows[self._key(cell_of(row))][row.seq_len] = row
        self._scratch = reserve.common_scratch(self._rows.values())
        self._series = {key: self._learn(list(found.values())) for key, found in self._rows.items()}
        self._errors = {key: series.errors() for key, series in self._series.items()}
        every = [abs(error) for errors in self._errors.values() for error in errors]
        # The median: a series that ran beside other work must not widen all intervals.
        self.scatter = max(1.4826 * float(np.median(every)), LEAST_SCATTER) if every else SCATTER
        self.tail = _tail(every)

    def estimate(self, cell: Cell) -> Estimate:
        """What is known of one cell; a measurement beside other work stands back behind a fit to quiet ones."""
        if cell.key not in self._answers:
            self._answers[cell.key] = self._estimate(cell)
        return self._answers[cell.key]

    def _estimate(self, cell: Cell) -> Estimate:
        key = self._key(cell)
        rows, series = self._rows.get(key, {}), self._series.get(key)
        figures = self.figures(cell)
        common = {name: getattr(cell, name) for name in _NAMED} | {"cell": cell.key}
        common["state_bytes"] = figures.state_bytes if figures else None
        common["peak_bytes"], common["peak_at_most"] = self._peak(cell, figures, rows)
        here = rows.get(cell.seq_len)
        if here is not None and not disturbed(here):
            return self._measured(here, common)
        terms = self._terms(cell)
        if series is not None and series.fit is not None and terms is not None and not (here and series.disturbed):
            return self._fitted(cell, series, self._errors[key], terms, common)
        return self._planned(cell, figures, rows, common) if here is None else self._measured(here, common)

    def beside(self, cell: Cell) -> int:
        """Bytes that live beside the peak of a cell: runtime or context, parameters, inputs, incoming state."""
        method = self._method(cell)
        if method is None:
            return 0
        needed = resident_bytes(Planned(cell, "", method, figures=self.figures(cell)))
        return needed + (CUDA_CONTEXT_BYTES if cell.device.startswith("cuda") else 0)

    def figures(self, cell: Cell) -> Figures | None:
        """What the formulas say; None where there are none, or they fail."""
        if cell.key not in self._figures:
            method = self._method(cell)
            try:
                self._figures[cell.key] = None if method is None else self._evaluator.figures(method, cell)
            except Exception:  # a plug-in's formula may raise anything
                self._figures[cell.key] = None
        return self._figures[cell.key]

    def state_growth(self, cell: Cell) -> str | None:
        """How the carried state grows with the length, by formula: ``O(1)``, ``O(T)``; None without a formula."""
        if cell.series not in self._growths:
            method = self._method(cell)
            try:
                cost = method and method.cost_of(
                    cell.impl, cell.mode, cell.causal, cell.position, cell.params_for(method)
                )
                self._growths[cell.series] = big_o(cost.state_bytes) if cost else None
            except Exception:  # a plug-in's formula may raise anything
                self._growths[cell.series] = None
        return self._growths[cell.series]

    def _key(self, cell: Cell) -> tuple[Any, ...]:
        """The series of a cell, with parameters that its row does not name at their defaults.

        A row of a version that had fewer parameters says of a new one what its default says.
        """
        method = self._method(cell)
        try:
            params = cell.params if method is None else cell.params_for(method).as_dict()
        except ValueError:  # a parameter that is gone, or a value that is refused now
            params = cell.params
        return msgspec.structs.replace(cell, params=params).series

    def _method(self, cell: Cell) -> Method | None:
        entry = self.registry.entries.get(cell.method)
        return None if entry is None else entry.method

    def _terms(self, cell: Cell) -> dict[str, float] | None:
        method = self._method(cell)
        return None if method is None else cost_terms(method, cell, self._evaluator)

    def _learn(self, rows: Sequence[Row]) -> _Series:
        return _Series(rows, [self._terms(cell_of(row)) for row in rows], self.steady)

    def _fitted(
        self, cell: Cell, series: _Series, errors: Sequence[float], terms: Terms, common: dict[str, Any]
    ) -> Estimate:
        from scipy.stats import t

        assert series.fit is not None
        middle = series.fit.predict(terms)
        octaves = max(1.0, math.log2(cell.seq_len / series.lengths[-1]))
        freedom = max(len(series.lengths) - LEAST_LENGTHS, 0)
        own = float(np.mean(np.square(errors))) if errors else 0.0
        variance = (freedom * own + PRIOR_DOF * self.scatter**2) / (freedom + PRIOR_DOF)
        wrong = max(float(t.ppf(0.975, freedom + PRIOR_DOF)) * math.sqrt(variance), self.tail) * math.sqrt(octaves)
        spread = math.exp(math.hypot(wrong, self.steady.movement))
        times = cell.seq_len / series.lengths[-1]
        beyond = f", {times:.3g} times the longest: unchecked beyond {FAR}" if times > FAR else ""
        shown = f"{format_tokens(series.lengths[0])}..{format_tokens(series.lengths[-1])}"
        return Estimate(
            source=FITTED, basis=f"own cost terms fitted to {counted(len(series.lengths), 'length')} {shown}{beyond}",
            latency_s=middle, low=middle / spread, high=middle * spread,
            power_law_s=power_law(series.lengths, series.seconds).predict(cell.seq_len),
            evidence=[row.cell for row in series.rows], **common,
        )  # fmt: skip

    def _measured(self, row: Row, common: dict[str, Any]) -> Estimate:
        assert row.latency_s is not None
        seconds, (low, high) = self.steady.seconds(row), self.steady.interval(row)
        moved = len(self.steady.off(row)) > 0
        count = row.latency_s.n_processes
        basis = counted(count, "process")
        if abs(seconds / latency(row) - 1) > TOLD:
            basis += f", {format_seconds(latency(row))} as the machine ran then"
        return Estimate(
            source=MEASURED, basis=basis, latency_s=seconds, low=low, high=high,
            as_measured_s=latency(row) if moved else None, evidence=[row.cell], **common,
        )  # fmt: skip

    def _planned(
        self, cell: Cell, figures: Figures | None, rows: Mapping[int, Row], common: dict[str, Any]
    ) -> Estimate:
        """What the plan would expect: the roofline, or the scaling of what little was measured."""
        points = [
            Point(
                seq_len=row.seq_len, latency_s=self.steady.seconds(row),
                peak_bytes=row.peak_bytes.allocated if row.peak_bytes else None, figures=self.figures(cell_of(row)),
            )
            for row in rows.values()
        ]  # fmt: skip
        found = roofline.forecast(cell, figures, self.ceilings, points)
        source = UNKNOWN if found.latency_s is None else SCALED if points else ROOFLINE
        basis = f"roofline, {self.basis}" if source == ROOFLINE and self.basis else found.basis
        return Estimate(
            source=source, basis=basis, latency_s=found.latency_s, low=found.low, high=found.high,
            evidence=[row.cell for row in rows.values()], **common,
        )  # fmt: skip

    def _peak(self, cell: Cell, figures: Figures | None, rows: Mapping[int, Row]) -> tuple[int | None, int | None]:
        """The likely peak and one to reserve; both None where neither formula nor row knows it."""
        known = {length: row for length, row in rows.items() if row.peak_bytes and row.peak_bytes.allocated}
        here = known.get(cell.seq_len)
        if here is not None:
            assert here.peak_bytes is not None
            return here.peak_bytes.allocated, reserve.needed(here)
        growth = self._growth_of(cell)
        if figures is not None and figures.peak_bytes is not None:
            expected = {length: self._peak_at(cell, length) for length in known}
            return reserve.by_formula(cell.seq_len, figures.peak_bytes, known, expected, growth, self._scratch)
        return reserve.by_lengths(cell.seq_len, known, growth, self._scratch) or (None, None)

    def _peak_at(self, cell: Cell, seq_len: int) -> int | None:
        found = self.figures(msgspec.structs.replace(cell, seq_len=seq_len))
        return None if found is None else found.peak_bytes

    def _growth_of(self, cell: Cell) -> reserve.Growth:
        """How many times larger the fastest growing product of a cell's impl is at another length."""

        def growth(shorter: int, longer: int) -> float | None:
            before, after = (self._terms(msgspec.structs.replace(cell, seq_len=n)) for n in (shorter, longer))
            if before is None or after is None:
                return None
            return max((after[name] / value for name, value in before.items() if value), default=None)

        return growth


def _tail(errors: Sequence[float]) -> float:
    """What 19 of 20 further errors of a run stay below, by those it shows; 0 where they are too few to tell."""
    index = math.ceil(0.95 * (len(errors) + 1)) - 1
    return sorted(errors)[index] if index < len(errors) else 0.0


def fits(found: Estimate, beside: int, limit: int | None) -> str:
    """Whether a cell stays below a memory limit: ``fits``, ``does not fit``, ``unclear`` or ``unknown``.

    Args:
        found: the cell's estimate.
        beside: bytes that live beside the peak: runtime, parameters, inputs, incoming state.
        limit: bytes of one process; None where there is no limit.
    """
    if limit is None or found.peak_bytes is None or found.peak_at_most is None:
        return "unknown"
    if found.peak_at_most + beside <= limit:
        return "fits"
    return "does not fit" if found.peak_bytes + beside > limit else "unclear"


_NAMED = ("method", "impl", "mode", "device", "dtype", "seq_len", "memory")


def latency(row: Row) -> float:
    """Seconds of one call of a measured row."""
    assert row.latency_s is not None
    return row.latency_s.median


def disturbed(row: Row) -> bool:
    """Whether every process of the row ran beside other work, so that its time is not the program's."""
    return bool(row.latency_s and row.latency_s.contended) and all(row.latency_s.contended)  # type: ignore[union-attr]
