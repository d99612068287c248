"""Crossovers, fronts, frontiers: planted crossings lie in their intervals; what does not fit is never said to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sympy import Integer

from ctxbench.analysis.crossover import FORECAST, MEASURED, NONE, crossovers
from ctxbench.analysis.curves import best, choose, curves
from ctxbench.analysis.forecast import Forecaster
from ctxbench.analysis.pareto import DISTURBED, DOMINATED, FRONT, UNCLEAR, frontier, pareto
from ctxbench.cell import Cell
from ctxbench.cost import Cost
from ctxbench.cost.roofline import Ceilings
from ctxbench.cost.symbols import B, T, d
from ctxbench.errors import UserError
from ctxbench.method import Method, Params
from ctxbench.registry import Entry, Registry
from ctxbench.rows import Latency, PeakBytes, Row, row_for

CEILINGS = Ceilings(flops_per_s={"fp32": 1e11}, bytes_per_s=1e10, calibrated=True)
LENGTHS = tuple(1024 * 2**octave for octave in range(6))


def quadratic(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"attention": 4 * B * d * T**2}
    return Cost(flops, flops, Integer(1000), peak_bytes=4 * B * T**2)


def linear(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"projections": 24 * B * T * d**2}
    return Cost(flops, flops, Integer(1000), peak_bytes=16 * B * T * d)


def unknown(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"projections": 24 * B * T * d**2}
    return Cost(flops, flops, Integer(1000))


REGISTRY = Registry()
for name, cost in (("square", quadratic), ("line", linear), ("unknown", unknown)):
    REGISTRY.entries[name] = Entry(Method(name=name, build="nowhere:build", cost=cost), "tests", "tests")


def row(method: str, length: int, medians: list[float], **changes: Any) -> Row:
    peak = changes.pop("peak", 16 * length * 256)
    contended = changes.pop("contended", [])
    status = changes.pop("status", "ok")
    changes = {"impl": "blocked", **changes}
    middle = float(np.median(medians))
    latency = Latency(
        median=middle, low=min(medians), high=max(medians), samples=[[value] for value in medians],
        n_processes=len(medians), contended=contended,
    )  # fmt: skip
    memory = PeakBytes(allocated=peak, resident=peak)
    return row_for(Cell(method=method, seq_len=length, **changes), status, latency_s=latency, peak_bytes=memory)


def crossing(at: float, noise: float = 0.0, seed: int = 0, processes: int = 3, **changes: Any) -> list[Row]:
    """A quadratic and a linear curve that cross at ``at`` tokens."""
    generator = np.random.default_rng(seed)
    rows = []
    for length in LENGTHS:
        for method, time in (("square", 1e-9 * length**2), ("line", 1e-9 * at * length)):
            own = changes if method == "line" else {}
            rows.append(row(method, length, list(time * np.exp(noise * generator.normal(size=processes))), **own))
    return rows


def pair(rows: list[Row], **changes: Any) -> Any:
    found = curves(rows)
    return crossovers(choose(found, "square"), choose(found, "line"), **changes)


def test_a_noiseless_crossing_is_found_where_it_is_planted() -> None:
    (found,) = pair(crossing(5000.0))
    assert (found.a, found.b, found.source, found.chance) == ("square / blocked", "line / blocked", MEASURED, 1.0)
    assert found.seq_len == pytest.approx(5000)
    assert (found.low, found.high) == (pytest.approx(5000), pytest.approx(5000))


@pytest.mark.parametrize(("processes", "noise"), [(3, 0.05), (5, 0.1)])
def test_intervals_hold_the_planted_crossing(processes: int, noise: float) -> None:
    generator = np.random.default_rng(3)
    held, widths = 0, []
    for seed in range(120):
        at = float(np.exp(generator.uniform(math.log(1500), math.log(20000))))
        found = [each for each in pair(crossing(at, noise, seed, processes)) if each.source == MEASURED]
        nearest = min(found, key=lambda each: abs(math.log(each.seq_len / at)))
        held += (nearest.low or 0) <= at <= (nearest.high or math.inf)
        widths.append((nearest.high or math.inf) / (nearest.low or 1))
    assert held >= 0.9 * 120
    assert float(np.median(widths)) < 1 + 8 * noise


def test_a_curve_that_is_always_faster_crosses_nowhere() -> None:
    (found,) = pair(crossing(1e6))
    assert (found.a, found.source, found.seq_len) == ("square / blocked", NONE, None)


def test_a_crossing_beyond_the_data_is_a_forecast_from_both_fits() -> None:
    (found,) = pair(crossing(100_000.0), forecaster=Forecaster(REGISTRY, CEILINGS, crossing(100_000.0)))
    assert found.source == FORECAST
    assert found.seq_len == pytest.approx(100_000, rel=0.1)
    assert (found.low or 32768) < 100_000 < (found.high or math.inf)


def test_every_memory_size_has_a_crossing_of_its_own() -> None:
    rows = crossing(2000.0, memory=128) + [r for r in crossing(8000.0, memory=512) if r.method == "line"]
    found = pair(rows)
    assert {(each.memory_b, round(each.seq_len)) for each in found} == {(128, 2000), (512, 8000)}


def test_disturbed_lengths_do_not_cross() -> None:
    rows = crossing(1e6)
    rows[-2] = row("square", LENGTHS[-1], [1e3], contended=[True])
    assert [each.source for each in pair(rows)] == [NONE]


def test_a_name_that_was_not_measured_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'square'"):
        choose(curves(crossing(5000.0)), "squar")


def test_the_best_impl_is_the_fastest_at_the_longest_length_and_no_sketch() -> None:
    rows = [row("square", 1024, [1.0]), row("square", 1024, [0.5], impl="fast")]
    rows += [row("square", 1024, [0.1], impl="as_written")]
    assert [curve.impl for curve in best(curves(rows))] == ["fast"]


def test_the_impl_that_reached_furthest_stands_for_a_method_unless_one_is_clearly_faster_not_much_before() -> None:
    def stands(**times: dict[int, float]) -> str:
        rows = [row("square", n, [t], impl=impl) for impl, known in times.items() for n, t in known.items()]
        (chosen,) = best(curves(rows))
        return chosen.impl

    far = {1024: 1.0, 2048: 2.0, 4096: 4.0}
    assert stands(reference=far, fast={1024: 0.8, 2048: 1.6}) == "fast"  # half as far
    assert stands(reference=far, fast={1024: 0.8}) == "reference"
    assert stands(reference=far, fast={1024: 0.8, 2048: 1.9}) == "reference"  # by 5 %, which one process cannot tell
    assert stands(reference=far, fast={1024: 0.8, 2048: 1.6}, faster={1024: 0.8, 2048: 1.4}) == "faster"
    assert stands(reference=far, fast={1024: 0.8, 4096: 3.9}) == "fast"  # as far, and faster there


def test_the_front_holds_what_nobody_beats_in_both() -> None:
    rows = [
        row("square", 1024, [1.0, 1.01], peak=100), row("line", 1024, [2.0, 2.02], peak=50),
        row("line", 1024, [3.0, 3.03], peak=70, impl="slow"),
        row("square", 1024, [1.005, 1.015], peak=100, impl="twin"),
        row("square", 1024, [9.0, 9.0], peak=100, impl="busy", contended=[True, True]),
    ]  # fmt: skip
    found = {point.label: (point.verdict, point.by) for point in pareto(curves(rows), 1024)}
    assert found == {
        "square / blocked": (FRONT, ""), "line / blocked": (FRONT, ""),
        "line / slow": (DOMINATED, "line / blocked"), "square / twin": (UNCLEAR, "square / blocked"),
        "square / busy": (DISTURBED, ""),
    }  # fmt: skip
    assert pareto(curves(rows), 2048) == []


def test_the_frontier_by_formula_is_the_last_length_that_fits() -> None:
    rows = [row(m, n, [1e-9 * n], peak=4 * n * n if m == "square" else 16 * n * 256) for m in ("square", "line")
            for n in LENGTHS]  # fmt: skip
    forecaster = Forecaster(REGISTRY, CEILINGS, rows)
    found = {(each.label, each.limit): each for each in frontier(curves(rows), rows, forecaster, [2**30, 2**34])}
    for (label, limit), each in found.items():
        peak = (lambda n: 4 * n * n) if label.startswith("square") else (lambda n: 16 * n * 256)
        beside = 400 * 2**20 + 3 * each.by_formula * 256 * 4
        assert peak(each.by_formula) + beside <= limit
        assert peak(int(1.2 * each.by_formula)) + beside * 1.2 > limit  # 15 % is kept for scratch
        assert each.measured <= each.by_formula
        assert each.consistent
    assert found["square / blocked", 2**30].exceeded == 16384


def test_without_a_peak_formula_the_longest_measured_length_is_no_limit() -> None:
    rows = [row("unknown", n, [1e-9 * n]) for n in LENGTHS]
    (found,) = frontier(curves(rows), rows, Forecaster(REGISTRY, CEILINGS, rows), [2**34])
    assert (found.by_formula, found.measured, found.consistent) == (None, LENGTHS[-1], None)


def test_a_formula_that_fits_what_ran_out_of_memory_is_contradicted() -> None:
    rows = [row("line", n, [1e-9 * n]) for n in LENGTHS[:4]]
    failed = row("line", LENGTHS[4], [1.0], status="oom")
    (found,) = frontier(curves(rows), [*rows, failed], Forecaster(REGISTRY, CEILINGS, rows), [2**34])
    assert (found.exceeded, found.consistent) == (LENGTHS[4], False)
