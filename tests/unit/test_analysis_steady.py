"""Times at one speed of the machine: a planted coefficient comes back, and a slow second moves no forecast."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from ctxbench.analysis.forecast import MEASURED, Forecaster
from ctxbench.analysis.holdout import holdout
from ctxbench.analysis.steady import Steady, slope
from ctxbench.cell import Cell
from ctxbench.cost.figures import Evaluator
from ctxbench.cost.roofline import Ceilings
from ctxbench.registry import discover
from ctxbench.rows import Latency, Row, cell_of, row_for
from ctxbench.units import format_seconds

CEILINGS = Ceilings(flops_per_s={"fp32": 1e11}, bytes_per_s=1e10, calibrated=True)
PRODUCT_S = 1.3e-3
REGISTRY = discover()


class Host:
    """A machine whose speed differs from process to process; a call follows the reference by ``coefficient``."""

    def __init__(self, coefficient: float, sigma: float = 0.01, seed: int = 0):
        self.coefficient, self.sigma, self.random = coefficient, sigma, np.random.default_rng(seed)

    def row(self, seconds: float, slower: Sequence[float], seq_len: int = 1024, method: str = "dense") -> Row:
        """A row whose processes ran while the reference took ``exp(slower)`` of its time."""
        medians = [
            seconds * math.exp(self.coefficient * off + self.random.normal(0, self.sigma)) for off in slower
        ]  # fmt: skip
        beats = [[[taken, PRODUCT_S * math.exp(off)] for taken in range(4)] for off in slower]
        found = REGISTRY[method]
        params = found.params().as_dict()
        cell = Cell(method=method, impl="blocked", seq_len=seq_len, params=params, position=found.positions[0],
                    memory=params.get(found.memory_parameter or ""))  # fmt: skip
        latency = Latency(
            median=float(np.median(medians)), low=min(medians), high=max(medians),
            samples=[[median] * 3 for median in medians], n_processes=len(medians),
        )  # fmt: skip
        return row_for(
            cell, "ok", latency_s=latency,
            env_delta={"processes": [{"reference_beside_s": beat} for beat in beats]},
        )  # fmt: skip

    def run(self, restless: float = 0.1, count: int = 12) -> list[Row]:
        """Two processes of one cell at many lengths."""
        return [self.row(0.01, self.random.normal(0, restless, 2), 256 * (index + 1)) for index in range(count)]


@pytest.mark.parametrize("coefficient", [0.0, 0.4, 1.0])
def test_a_planted_coefficient_comes_back_whatever_the_cells_take(coefficient: float) -> None:
    found = Steady(Host(coefficient).run(count=60))
    assert found.coefficient == pytest.approx(coefficient, abs=0.06)
    assert found.noise == pytest.approx(0.02, abs=0.005)  # the least that is assumed


def test_a_row_is_told_at_the_typical_speed_and_its_slow_process_counts_less() -> None:
    host = Host(0.7, sigma=0.0)
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
    other = Host(0.0, sigma=0.0).row(0.01, [0.0, 1.1], 768)
    assert found.seconds(other) == pytest.approx(0.01, rel=0.02)


def test_rows_without_the_reference_or_too_few_of_them_stay_as_they_are() -> None:
    host = Host(0.7)
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


def planted(method: str, length: int) -> float:
    """A dispatch, and the formula's FLOPs at one rate."""
    found = Host(0.0).row(1.0, [0.0], length, method)
    figures = Evaluator().figures(REGISTRY[method], cell_of(found))
    assert figures is not None
    return 2e-4 + figures.flops / 1e11


def test_forecasts_on_a_restless_machine_come_closer_to_the_planted_law() -> None:
    law = {
        (method, 1024 * 2**octave): planted(method, 1024 * 2**octave)
        for method in ("dense", "longformer", "bigbird", "transformer_xl")
        for octave in range(5)
    }
    errors, apart = [], []
    for seed in range(4):
        host = Host(0.8, sigma=0.015, seed=seed)
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


def test_a_measured_answer_is_at_the_typical_speed_and_says_what_was_measured() -> None:
    host = Host(0.8)
    usual, slow = host.run(restless=0.03), host.row(0.01, [0.4, 0.5], 8192)
    answer = Forecaster(REGISTRY, CEILINGS, [*usual, slow]).estimate(cell_of(slow))
    assert slow.latency_s is not None
    assert (answer.source, answer.as_measured_s) == (MEASURED, slow.latency_s.median)
    assert answer.latency_s == pytest.approx(0.01, rel=0.1)
    assert answer.low is not None
    assert answer.high is not None
    assert answer.low <= answer.latency_s <= answer.high
    assert f"{format_seconds(slow.latency_s.median)} as the machine ran then" in answer.basis
