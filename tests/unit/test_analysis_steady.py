"""Times at one speed of the machine: a planted coefficient comes back, and a slow second moves no forecast."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from ctxbench.analysis.forecast import MEASURED, Forecaster
from ctxbench.analysis.holdout import holdout
from ctxbench.analysis.steady import Steady, slope
from ctxbench.cost.figures import Evaluator
from ctxbench.cost.roofline import Ceilings
from ctxbench.registry import discover
from ctxbench.rows import cell_of
from ctxbench.units import format_seconds

CEILINGS = Ceilings(flops_per_s={"fp32": 1e11}, bytes_per_s=1e10, calibrated=True)
REGISTRY = discover()


@pytest.mark.parametrize("coefficient", [0.0, 0.4, 1.0])
def test_a_planted_coefficient_comes_back_whatever_the_cells_take(coefficient: float, restless_host: Any) -> None:
    found = Steady(restless_host(coefficient).run(count=60))
    assert found.coefficient == pytest.approx(coefficient, abs=0.06)
    assert found.noise == pytest.approx(0.02, abs=0.005)  # the least that is assumed


def test_a_row_is_told_at_the_typical_speed_and_its_slow_process_counts_less(restless_host: Any) -> None:
    host = restless_host(0.7, sigma=0.0)
    usual = host.run(restless=0.05, count=40)
    slowed = host.row(0.01, [0.0, 1.1], 512)
    found = Steady([*usual, slowed])
    assert slowed.latency_s is not None
    assert slowed.latency_s.median > 0.015
    assert found.seconds(slowed) == pytest.approx(0.01, rel=0.02)
    low, high = found.interval(slowed)
    assert low <= found.seconds(slowed) <= high < 0.011
    light, heavy = found.weights(np.array([1.1, 0.0]))
    assert heavy > 50 * light
    # A call that follows the reference by less than the others: the process at the usual speed decides.
    other = restless_host(0.0, sigma=0.0).row(0.01, [0.0, 1.1], 768)
    assert found.seconds(other) == pytest.approx(0.01, rel=0.02)


def test_a_restless_machine_widens_what_a_measurement_may_be(restless_host: Any) -> None:
    quiet, restless = (Steady(restless_host(0.7).run(restless=by, count=60)) for by in (0.02, 0.3))
    assert quiet.movement < 0.1 < restless.movement
    assert Steady(restless_host(0.7).run(count=7)).movement == 0  # too few to know that calls follow the reference


def test_rows_without_the_reference_or_too_few_of_them_stay_as_they_are(restless_host: Any) -> None:
    host = restless_host(0.7)
    few = host.run(count=7)
    bare = host.row(0.01, [0.3, 0.1])
    bare.env_delta = {}
    found = Steady([*few, bare])
    assert found.coefficient is None
    for row in (*few, bare):
        assert row.latency_s is not None
        assert (found.seconds(row), len(found.off(row))) == (row.latency_s.median, 0)
        assert found.interval(row) == (row.latency_s.low, row.latency_s.high)
    known = Steady([*host.run(), bare])
    assert known.coefficient is not None
    assert bare.latency_s is not None
    assert known.seconds(bare) == bare.latency_s.median


def test_the_line_through_the_origin_ignores_a_wild_value() -> None:
    changes = np.array([0.1, -0.2, 0.3, 0.1, 0.0])
    assert slope(changes, 0.5 * changes + np.array([0, 0, 0, 3, 1])) == pytest.approx(0.5)
    assert slope([], []) == 0


def planted(host: Any, method: str, length: int) -> float:
    """A dispatch, and the formula's FLOPs at one rate."""
    found = host(0.0).row(1.0, [0.0], length, method)
    figures = Evaluator().figures(REGISTRY[method], cell_of(found))
    assert figures is not None
    return 2e-4 + figures.flops / 1e11


def test_forecasts_on_a_restless_machine_come_closer_to_the_planted_law(restless_host: Any) -> None:
    law = {
        (method, 1024 * 2**octave): planted(restless_host, method, 1024 * 2**octave)
        for method in ("dense", "longformer", "bigbird", "transformer_xl")
        for octave in range(5)
    }
    errors, apart = [], []
    for seed in range(4):
        host = restless_host(0.8, sigma=0.015, seed=seed)
        rows = [host.row(s, host.random.normal(0, 0.15, 2), length, method) for (method, length), s in law.items()]
        bare = [msgspec.structs.replace(row, env_delta={}) for row in rows]
        plain, found = (holdout(each, REGISTRY, CEILINGS) for each in (bare, rows))
        assert plain.steady is None
        assert found.steady is not None
        errors.append([
            np.mean([abs(cell.forecast_s / law[cell.method, cell.seq_len] - 1) for cell in each.cells])
            for each in (plain, found)
        ])  # fmt: skip
        apart.append((found.median_error, found.steady.median_error))
        assert all(cell.steady_s == cell.measured_s for cell in plain.cells)
    without, adjusted = np.mean(errors, axis=0)
    assert adjusted < 0.6 * without
    as_measured, steady = np.mean(apart, axis=0)
    assert steady < as_measured


def test_a_measured_answer_is_at_the_typical_speed_and_says_what_was_measured(restless_host: Any) -> None:
    host = restless_host(0.8)
    usual, slow = host.run(restless=0.03), host.row(0.01, [0.4, 0.5], 8192)
    answer = Forecaster(REGISTRY, CEILINGS, [*usual, slow]).estimate(cell_of(slow))
    assert slow.latency_s is not None
    assert (answer.source, answer.as_measured_s) == (MEASURED, slow.latency_s.median)
    assert answer.latency_s == pytest.approx(0.01, rel=0.1)
    assert answer.low is not None
    assert answer.high is not None
    assert answer.low <= answer.latency_s <= answer.high
    assert f"{format_seconds(slow.latency_s.median)} as the machine ran then" in answer.basis
