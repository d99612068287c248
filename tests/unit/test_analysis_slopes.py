"""Slopes and the fit of one constant recover what was planted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ctxbench.analysis.frame import to_frame
from ctxbench.analysis.runs import Run
from ctxbench.analysis.slopes import fit_constant, local_slopes, model_table, trend
from ctxbench.cell import Cell
from ctxbench.rows import Flops, Latency, row_for

LENGTHS = [1000, 2000, 4000, 8000, 16000]


@pytest.mark.parametrize("exponent", [0, 1, 1.5, 2])
def test_local_slopes_and_trend_recover_a_planted_exponent(exponent):
    values = [3e-9 * length**exponent for length in LENGTHS]
    assert [step.value for step in local_slopes(LENGTHS, values)] == pytest.approx([exponent] * 4)
    assert trend(LENGTHS, values).value == pytest.approx(exponent)


def test_bounds_of_a_local_slope_take_the_ends_that_tilt_it_most():
    (step,) = local_slopes([1, 2], [10, 20], low=[9, 18], high=[11, 22])
    assert step.low == pytest.approx(math.log2(18 / 11))
    assert step.high == pytest.approx(math.log2(22 / 9))
    assert step.seq_len == pytest.approx(math.sqrt(2))


def test_one_outlier_does_not_move_the_trend():
    values = [length**2 for length in LENGTHS]
    values[0] *= 4
    assert trend(LENGTHS, values).value == pytest.approx(2, abs=0.15)


def test_a_trend_needs_two_points_and_gives_an_interval_from_four_on():
    assert trend([1], [1]) is None
    assert math.isnan(trend([1, 2], [1, 2]).low)
    assert trend(LENGTHS, LENGTHS).low <= 1 <= trend(LENGTHS, LENGTHS).high


def test_the_fitted_constant_weighs_relative_errors_equally():
    assert fit_constant([2, 2000], [1, 1000]) == pytest.approx(2)
    assert fit_constant([1, 4000], [1, 1000]) == pytest.approx(2)


def rows(statuses, formula=True):
    found = []
    for length, status in zip(LENGTHS, statuses, strict=True):
        work = 500 * length + length**2
        seconds = work / 1e9
        latency = Latency(median=seconds, low=seconds, high=seconds, samples=[[seconds]], n_processes=1)
        flops = Flops(algorithmic=work // 2, formula=work if formula else None, counted=None)
        cell = Cell(method="m", impl="i", seq_len=length)
        found.append(row_for(cell, status, flops=flops, latency_s=latency if status == "ok" else None))
    return to_frame([Run(Path("run"), tuple(found))])


def test_the_model_table_recovers_rate_residuals_and_the_slope_of_the_formula():
    table = model_table(rows(["ok"] * 5))
    assert list(table["model_s"]) == pytest.approx(list(table["latency_s"]))
    assert list(table["residual"]) == pytest.approx([0] * 5, abs=1e-12)
    assert list(table["slope"][1:]) == pytest.approx(list(table["slope_formula"][1:]))
    assert 1 < table["slope"].iloc[1] < table["slope"].iloc[4] < 2


def test_the_model_reaches_over_lengths_without_a_measurement():
    table = model_table(rows(["ok", "error", "ok", "oom", "skipped"]))
    assert table["model_s"].notna().all()
    assert list(table["latency_s"].notna()) == [True, False, True, False, False]
    assert table["slope_at"].iloc[2] == pytest.approx(2000)  # between 1000 and 4000


def test_without_a_formula_the_model_says_what_it_rests_on():
    assert set(model_table(rows(["ok"] * 5, formula=False))["basis"]) == {"flops_algorithmic"}


def test_a_series_without_any_measurement_has_no_model():
    table = model_table(rows(["oom"] * 5))
    assert table["model_s"].isna().all()
    assert table["slope"].isna().all()
