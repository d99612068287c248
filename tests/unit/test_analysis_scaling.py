"""Exponents with honest intervals, and changes of regime that are named: on curves whose truth is planted."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from ctxbench.analysis.scaling import Curve, format_length, scalings
from ctxbench.cell import Cell
from ctxbench.rows import Flops, Latency, Row, row_for

LENGTHS = [1024 * 2**step for step in range(8)]
WINDOW = 4096


def ramp(length: float) -> float:
    """Visible pairs of causal attention in a window: quadratic up to the window, linear beyond."""
    return 1e-9 * (length**2 / 2 if length <= WINDOW else WINDOW**2 / 2 + (length - WINDOW) * WINDOW)


class Draw:
    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def curve(self, law: Callable[[float], float], sigma: float, count: int = 3) -> Curve:
        seconds = [[law(length) * math.exp(self.random.normal(0, sigma)) for _ in range(count)] for length in LENGTHS]
        return Curve(LENGTHS, seconds, [law(length) for length in LENGTHS])


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2])
def test_intervals_of_a_power_law_hold_the_truth_in_90_to_97_percent(sigma, count):
    draw, trials, inside = Draw(round(1000 * sigma) + count), 400, np.zeros(2)
    for _ in range(trials):
        exponent = draw.random.uniform(1, 2)
        curve = draw.curve(lambda length, a=exponent: 1e-9 * length**a, sigma, count)
        inside += [slope.low <= exponent <= slope.high for slope in (curve.overall(), curve.tail())]
    assert ((inside / trials >= 0.90) & (inside / trials <= 0.97)).all(), inside / trials


@pytest.mark.parametrize("sigma", [0.01, 0.2])
def test_a_power_law_is_one_regime(sigma):
    draw = Draw(2)
    assert sum(bool(draw.curve(lambda length: 1e-9 * length**1.5, sigma).breaks()) for _ in range(100)) <= 2


@pytest.mark.parametrize("sigma", [0.01, 0.03, 0.1])
def test_a_window_ramp_is_a_change_of_regime_and_never_one_exponent(sigma):
    draw = Draw(3)
    for _ in range(20):
        curve = draw.curve(ramp, sigma)
        breaks = curve.breaks()
        first, *_, last = curve.pieces(breaks)
        assert len(breaks) in (1, 2)
        assert WINDOW / 2 <= math.exp(breaks[0]) <= 4 * WINDOW
        assert first.value == pytest.approx(2, abs=0.25)
        assert last.value == pytest.approx(1, abs=0.25)
        assert curve.tail(breaks).value == pytest.approx(1, abs=0.25)


BENDS = {  # a sum of powers, and its exponent at the longest length
    "constant": (lambda length: 1e-3 + 1e-7 * length, 0.1 * 131.072 / (1 + 0.1 * 131.072)),
    "square": (lambda length: 1e-7 * (length + length**2 / 16384), 17 / 9),
    "root": (lambda length: 2e-3 + 1e-9 * length**1.5, 1.5 * 47.453 / (2 + 47.453)),
}


@pytest.mark.parametrize(("sigma", "count"), [(0.02, 3), (0.05, 5)], ids=str)
@pytest.mark.parametrize("bend", BENDS)
def test_where_a_curve_bends_the_tail_is_the_exponent_at_its_end(bend, sigma, count):
    (law, truth), draw, trials = BENDS[bend], Draw(8), 100
    tails = [curve.tail(curve.breaks()) for curve in (draw.curve(law, sigma, count) for _ in range(trials))]
    assert sum(abs(tail.value - truth) <= 0.1 for tail in tails) >= 0.9 * trials
    assert sum(tail.low <= truth <= tail.high for tail in tails) >= 0.9 * trials
    assert sum((tail.first, tail.last) == (LENGTHS[-1], LENGTHS[-1]) for tail in tails) >= 0.8 * trials
    exact = draw.curve(law, 0.0, count)
    assert exact.tail(exact.breaks()).value == pytest.approx(truth, abs=2e-3)


def test_a_sum_of_powers_is_no_excuse_for_a_corner():
    draw = Draw(9)
    for _ in range(50):
        curve = draw.curve(lambda length: 1e-9 * length * min(length, 32768), 0.05)
        tail = curve.tail(curve.breaks())
        assert (tail.first, tail.last) == (32768, 131072)
        assert tail.value == pytest.approx(1, abs=0.25)


def test_a_zigzag_has_no_regimes():
    factors = dict(zip(LENGTHS, (1, 1.3) * 4, strict=True))
    assert Draw(4).curve(lambda length: 1e-9 * length * factors[length], 0.01, 8).breaks() == []


def test_slopes_of_the_formula_come_from_the_same_fit():
    curve = Draw(5).curve(ramp, 0.0)
    breaks = curve.breaks()
    for slope in (*curve.pieces(breaks), *curve.steps(), curve.tail(breaks)):
        assert slope.value == pytest.approx(slope.formula)
    assert [round(step.formula, 1) for step in curve.steps()] == [2.0, 2.0, 1.6, 1.2, 1.1, 1.0, 1.0]


def test_identical_processes_still_get_an_interval_and_single_ones_none():
    same = Curve(LENGTHS, [[1e-9 * length] * 3 for length in LENGTHS]).overall()
    assert same.low < same.value < same.high < same.low + 0.01
    single = Curve(LENGTHS, [[1e-9 * length**2] for length in LENGTHS]).overall()
    assert (single.low, single.high, single.value) == (None, None, pytest.approx(2))


def test_a_length_with_one_process_borrows_the_scatter_of_the_others():
    draw, inside = Draw(6), 0
    for _ in range(200):
        counts = [3] * 6 + [1, 1]
        seconds = [
            [length * math.exp(draw.random.normal(0, 0.05)) for _ in range(n)]
            for length, n in zip(LENGTHS, counts, strict=True)
        ]
        overall = Curve(LENGTHS, seconds).overall()
        inside += overall.low <= 1 <= overall.high
    assert 0.88 <= inside / 200 <= 0.99


def rows(law: Callable[[float], float], status: str = "ok", **changes) -> list[Row]:
    found = []
    for length in LENGTHS:
        seconds = law(length)
        samples = [[seconds * factor] for factor in (0.99, 1.0, 1.01)]
        latency = Latency(median=seconds, low=seconds, high=seconds, samples=samples, n_processes=3)
        cell = Cell(method="m", impl="i", seq_len=length, **changes)
        work = round(1e12 * law(length))
        found.append(row_for(cell, status, latency_s=latency, flops=Flops(formula=work)))
    return found


def test_a_single_exponent_is_refused_where_the_regime_changes():
    window, plain, failed = rows(ramp), rows(lambda length: 1e-9 * length**2, memory=7), rows(ramp, "oom", memory=8)
    ramped, square = scalings([*window, *plain, *failed])
    assert ramped.overall is None
    assert "crossing over to T^1" in ramped.text
    assert len(ramped.changes) == len(ramped.regimes) - 1 == ramped.formula_text.count(",")
    assert (square.memory, square.text[:6], square.formula_text) == (7, "T^2.00", "T^2.00")
    assert square.overall.low < 2 < square.overall.high


def test_two_lengths_are_no_series_and_three_have_no_regimes():
    assert scalings(rows(ramp)[:2]) == []
    (three,) = scalings(rows(ramp)[:3])
    assert three.overall is not None
    assert (three.tail.first, three.tail.last) == (1024, 4096)


@pytest.mark.parametrize(
    ("tokens", "text"), [(512, "512"), (1448, "1.4k"), (5793, "5.7k"), (92682, "91k"), (131072, "128k")]
)
def test_lengths_between_measured_ones_have_two_digits(tokens, text):
    assert format_length(tokens) == text
