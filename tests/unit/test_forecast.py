"""Forecasts: a roofline first, scaling once something of the series has finished; ceilings and their cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench.cell import Cell
from ctxbench.cost import machine
from ctxbench.cost.figures import Figures
from ctxbench.cost.roofline import Ceilings, Point, call_bound, call_model, forecast

CEILINGS = Ceilings(flops_per_s={"fp32": 1e11, "bf16": 2e11}, bytes_per_s=1e10, calibrated=True)


def cell(seq_len: int) -> Cell:
    return Cell(method="m", impl="i", seq_len=seq_len)


def figures(seq_len: int, exponent: float = 2) -> Figures:
    flops = int(1000 * seq_len**exponent)
    return Figures(algorithmic=flops, flops=flops, num_parameters=10_000, state_bytes=0, peak_bytes=16 * seq_len**2)


def test_a_roofline_forecast_lies_between_its_bound_and_its_high_end() -> None:
    found = forecast(cell(4096), figures(4096), CEILINGS)
    assert found.low == pytest.approx(call_bound(cell(4096), figures(4096), CEILINGS))
    assert found.low < found.latency_s < found.high
    assert (found.peak_bytes, found.basis) == (16 * 4096**2, "roofline")


def test_built_in_ceilings_are_called_uncalibrated_and_trusted_less() -> None:
    rough = msgspec.structs.replace(CEILINGS, calibrated=False)
    calibrated, uncalibrated = (forecast(cell(4096), figures(4096), ceilings) for ceilings in (CEILINGS, rough))
    assert uncalibrated.basis == "roofline, uncalibrated"
    assert uncalibrated.low < calibrated.low


def test_training_and_more_steps_cost_more() -> None:
    forward = call_model(cell(64), figures(64), CEILINGS)
    train = call_model(msgspec.structs.replace(cell(64), mode="train"), figures(64), CEILINGS)
    stepwise = call_model(cell(64), msgspec.structs.replace(figures(64), depth=100), CEILINGS)
    assert train > forward
    assert stepwise > 10 * forward


@given(factor=st.floats(0.1, 20), shorter=st.sampled_from([1024, 2048]), target=st.sampled_from([4096, 8192]))
def test_a_machine_of_another_constant_speed_is_forecast_exactly(factor: float, shorter: int, target: int) -> None:
    points = [
        Point(seq_len=t, latency_s=factor * call_model(cell(t), figures(t), CEILINGS), figures=figures(t))
        for t in (shorter // 2, shorter)
    ]
    found = forecast(cell(target), figures(target), CEILINGS, points)
    assert found.latency_s == pytest.approx(factor * call_model(cell(target), figures(target), CEILINGS))
    assert found.low < found.latency_s < found.high
    assert found.basis.startswith("formula, scaled from")


def test_the_nearest_finished_length_is_the_anchor_and_a_bend_is_followed() -> None:
    slower = {1024: 1.0, 2048: 1.2}
    points = [
        Point(seq_len=t, latency_s=bend * call_model(cell(t), figures(t), CEILINGS), figures=figures(t))
        for t, bend in slower.items()
    ]
    found = forecast(cell(4096), figures(4096), CEILINGS, points)
    assert found.latency_s == pytest.approx(1.44 * call_model(cell(4096), figures(4096), CEILINGS))
    assert found.basis.endswith("from 2k")


@given(exponent=st.floats(0.5, 2.5))
def test_without_formulas_a_power_law_through_two_lengths_continues(exponent: float) -> None:
    points = [Point(seq_len=t, latency_s=1e-6 * t**exponent, peak_bytes=int(t**1.5)) for t in (1024, 2048)]
    found = forecast(cell(8192), None, CEILINGS, points)
    assert found.latency_s == pytest.approx(1e-6 * 8192**exponent, rel=1e-6)
    assert found.peak_bytes == pytest.approx(8192**1.5, rel=0.01)
    assert found.low <= found.latency_s <= found.high


def test_one_length_without_a_formula_gives_a_wide_forecast() -> None:
    found = forecast(cell(4096), None, CEILINGS, [Point(seq_len=1024, latency_s=0.1)])
    assert (found.low, found.latency_s, found.high) == (0.4, pytest.approx(0.8), pytest.approx(1.6))
    assert found.peak_bytes is None


def test_with_neither_formula_nor_measurement_nothing_is_claimed() -> None:
    found = forecast(cell(4096), None, CEILINGS)
    assert (found.latency_s, found.peak_bytes) == (None, None)
    assert "no formula" in found.basis


def test_a_peak_above_its_formula_corrects_the_forecast_of_the_next_length() -> None:
    point = Point(seq_len=1024, latency_s=0.1, peak_bytes=2 * 16 * 1024**2, figures=figures(1024))
    assert forecast(cell(2048), figures(2048), CEILINGS, [point]).peak_bytes == 2 * 16 * 2048**2


def test_a_dtype_that_was_not_calibrated_takes_the_slowest_ceiling() -> None:
    assert CEILINGS.matmul("bf16") == 2e11
    assert CEILINGS.matmul("fp64") == 1e11


def test_a_disturbed_calibration_does_not_lower_known_ceilings() -> None:
    disturbed = msgspec.structs.replace(CEILINGS, flops_per_s={"fp32": 5e10, "fp64": 1e10}, bytes_per_s=2e10)
    raised = CEILINGS.raised_by(disturbed)
    assert raised.flops_per_s == {"fp32": 1e11, "bf16": 2e11, "fp64": 1e10}
    assert raised.bytes_per_s == 2e10
    assert machine.built_in("cpu", 1).raised_by(disturbed) == disturbed


def test_ceilings_are_cached_by_machine_threads_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not machine.load("cpu", 2, "2.13.0").calibrated
    measured = msgspec.structs.replace(CEILINGS, threads=2)
    assert machine.save(measured, "2.13.0")
    assert machine.load("cpu", 2, "2.13.0") == measured
    for other in (("cpu", 1, "2.13.0"), ("cpu", 2, "2.14.0"), ("cuda", 2, "2.13.0")):
        assert not machine.load(*other).calibrated


def test_a_damaged_or_unwritable_cache_costs_only_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.save(CEILINGS, "x")
    (path,) = (tmp_path / "ctxbench").iterdir()
    path.write_text("{")
    assert not machine.load("cpu", 0, "x").calibrated
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not machine.save(CEILINGS, "x")


def test_figures_are_the_formulas_at_the_cell(lab: Any) -> None:
    plan = lab.plan(methods="square,window", seq_len="1k")
    square, window = plan.cells
    assert square.figures.flops == 4 * 256 * 1024**2
    assert window.figures.flops == 4 * 256 * 1024 * 256
    assert square.figures.peak_bytes == 4 * 1024**2
