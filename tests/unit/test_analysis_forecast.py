"""Forecasts from cost terms: planted laws come back, intervals hold what they promise, no peak is underestimated."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from sympy import Integer

from ctxbench.analysis.devices import DEVICES
from ctxbench.analysis.fit import FLOPS, fit, power_law
from ctxbench.analysis.forecast import FITTED, MEASURED, ROOFLINE, SCALED, UNKNOWN, Forecaster, fits
from ctxbench.analysis.holdout import holdout
from ctxbench.analysis.reserve import needed
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
MIB = 2**20


def mixed(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"projections": 24 * B * T * d**2, "attention": 4 * B * d * T**2}
    return Cost(flops, flops, Integer(1000), peak_bytes=20 * B * T * d)


def level(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    """Products that every token needs as often, at any length."""
    flops = {"projections": 24 * B * T * d**2}
    return Cost(flops, flops, Integer(1000), peak_bytes=20 * B * T * d)


def level_unstated(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"projections": 24 * B * T * d**2}
    return Cost(flops, flops, Integer(1000))


def unstated(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"projections": 24 * B * T * d**2, "attention": 4 * B * d * T**2}
    return Cost(flops, flops, Integer(1000))


def make_registry(count: int = 1) -> Registry:
    registry = Registry()
    for index in range(count):
        method = Method(name=f"mixed_{index}", build="nowhere:build", cost=mixed)
        registry.entries[method.name] = Entry(method, "tests", "tests")
    registry.entries["plain"] = Entry(Method(name="plain", build="nowhere:build"), "tests", "tests")
    return registry


def cell(seq_len: int, method: str = "mixed_0", **changes: Any) -> Cell:
    return Cell(method=method, impl="reference", seq_len=seq_len, **changes)


def seconds(seq_len: int, rate: float = 1.0, bend: float = 1.0) -> float:
    """A dispatch, projections at one rate and attention at another."""
    return rate * (3e-4 + 24 * seq_len * 256**2 / 6e10 + bend * 4 * 256 * seq_len**2 / 1.5e11)


def row(seq_len: int, time: float, method: str = "mixed_0", peak: int | None = None, **changes: Any) -> Row:
    peak = peak or 20 * seq_len * 256
    latency = Latency(median=time, low=time, high=time, samples=[[time]] * 3, n_processes=3, **changes)
    memory = PeakBytes(allocated=peak, resident=peak + 2**20, formula=20 * seq_len * 256)
    return row_for(cell(seq_len, method), "ok", latency_s=latency, peak_bytes=memory)


def noisy_rows(count: int, noise: float, seed: int) -> list[Row]:
    """Methods that share a law up to their rates, with lognormal noise."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        rate, bend = generator.uniform(0.5, 2.0), generator.uniform(0.4, 2.5)
        for length in LENGTHS:
            time = seconds(length, rate, bend) * generator.lognormvariate(0, noise)
            rows.append(row(length, time, f"mixed_{index}"))
    return rows


def test_planted_weights_are_found_and_none_is_negative() -> None:
    terms = [{"constant": 1.0, FLOPS + "a": 1e6 * n, FLOPS + "b": 1e3 * n * n} for n in (1000, 2000, 4000, 8000)]
    found = fit(terms, [1e-3 + 2e-11 * each[FLOPS + "a"] + 2e-11 * each[FLOPS + "b"] for each in terms])
    assert found.weights == pytest.approx({"constant": 1e-3, FLOPS + "a": 2e-11, FLOPS + "b": 2e-11}, rel=1e-6)
    falling = fit(terms, [4e-2, 3e-2, 2e-2, 1e-2])
    assert min(falling.weights.values()) >= 0


def test_a_fit_forecasts_where_a_power_law_fails() -> None:
    rows = [row(length, seconds(length)) for length in LENGTHS[:5]]
    found = Forecaster(make_registry(), CEILINGS, rows).estimate(cell(65536))
    truth = seconds(65536)
    assert found.source == FITTED
    assert found.latency_s == pytest.approx(truth, rel=0.03)
    assert found.low is not None
    assert found.high is not None
    assert found.low < truth < found.high
    assert found.power_law_s is not None
    assert found.power_law_s < 0.8 * truth
    assert found.evidence == [each.cell for each in rows]


def test_the_sources_of_an_estimate_in_the_order_of_what_is_known() -> None:
    registry, rows = make_registry(), [row(length, seconds(length)) for length in LENGTHS[:3]]
    learnt = Forecaster(registry, CEILINGS, rows)
    assert learnt.estimate(cell(1024)).source == MEASURED
    assert learnt.estimate(cell(8192)).source == FITTED
    assert "unchecked beyond 8" in learnt.estimate(cell(131072)).basis
    assert Forecaster(registry, CEILINGS, rows[:1]).estimate(cell(8192)).source == SCALED
    alone = Forecaster(registry, DEVICES["h200"].ceilings, basis="datasheet peaks of it")
    found = alone.estimate(cell(8192, device="cuda", dtype="bf16"))
    assert (found.source, found.basis, found.evidence) == (ROOFLINE, "roofline, datasheet peaks of it", [])
    assert learnt.estimate(cell(8192, "plain")).source == UNKNOWN
    assert learnt.estimate(cell(8192, d_model=512)).source == ROOFLINE  # another series


def test_a_row_that_ran_beside_other_work_is_not_learnt_from() -> None:
    quiet = [row(length, seconds(length)) for length in LENGTHS[:4]]
    noisy = row(LENGTHS[4], 10 * seconds(LENGTHS[4]), contended=[True, True, True])
    found = Forecaster(make_registry(), CEILINGS, [*quiet, noisy]).estimate(cell(LENGTHS[5]))
    assert found.latency_s == pytest.approx(seconds(LENGTHS[5]), rel=0.05)


@pytest.mark.parametrize(("noise", "bound"), [(0.02, 0.06), (0.05, 0.10)])
def test_held_out_lengths_lie_inside_their_intervals(noise: float, bound: float) -> None:
    found = holdout(noisy_rows(40, noise, seed=5), make_registry(40), CEILINGS)
    assert len(found.cells) == 40
    assert found.median_error <= bound
    assert found.median_error < found.power_law_median_error
    assert found.coverage >= 0.9
    widths = sorted(each.high / each.forecast_s for each in found.cells)
    assert widths[20] < 1 + 12 * noise  # it covers without claiming nothing


def test_errors_with_long_tails_widen_the_intervals() -> None:
    """One time in twelve is off by a third, as where a length leaves the caches: a normal law would not hold them."""
    generator = random.Random(3)
    rows = noisy_rows(60, 0.01, seed=7)
    for each in rows:
        assert each.latency_s is not None
        if generator.random() < 1 / 12:
            each.latency_s.median *= 4 / 3
    forecaster = Forecaster(make_registry(60), CEILINGS, [each for each in rows if each.seq_len < LENGTHS[-1]])
    assert forecaster.tail > 2.5 * forecaster.scatter
    found = holdout(rows, make_registry(60), CEILINGS)
    assert found.coverage >= 0.9
    assert sorted(each.high / each.forecast_s for each in found.cells)[30] < 1.6


def test_a_row_that_rests_on_a_process_beside_other_work_is_no_truth() -> None:
    rows = [row(length, seconds(length)) for length in LENGTHS]
    rows[-1] = row(LENGTHS[-1], 2 * seconds(LENGTHS[-1]), contended=[False, True, True])
    found = holdout(rows, make_registry(), CEILINGS)
    assert ([each.seq_len for each in found.cells], found.disturbed) == ([LENGTHS[-2]], 1)


def test_too_short_a_run_says_what_it_takes() -> None:
    with pytest.raises(UserError, match="at least four lengths"):
        holdout([row(length, seconds(length)) for length in LENGTHS[:3]], make_registry(), CEILINGS)


def test_no_peak_of_a_program_that_takes_more_than_its_formula_is_said_to_fit() -> None:
    generator = random.Random(11)
    for excess in (1.0, 1.02, 1.2, 2.0):
        rows = [
            row(length, seconds(length), peak=int(20 * length * 256 * excess * generator.uniform(0.99, 1)))
            for length in LENGTHS
        ]
        found = holdout(rows, make_registry(), CEILINGS, held=2)
        assert (found.peaks, found.false_fits) == (2, 0)
        learnt = Forecaster(make_registry(), CEILINGS, rows[:4]).estimate(cell(LENGTHS[5]))
        peak = rows[5].peak_bytes
        assert peak is not None
        assert peak.allocated is not None
        assert fits(learnt, 1000, peak.allocated + 999) != "fits"
        assert fits(learnt, 1000, 2 * peak.allocated) == "fits"
        assert fits(learnt, 1000, peak.allocated // 2) == "does not fit"
    assert fits(msgspec.structs.replace(learnt, peak_bytes=None), 0, 1) == "unknown"


def reserve(rows: list[Row], seq_len: int) -> float:
    """MiB to reserve above the formula of a length."""
    found = Forecaster(make_registry(), CEILINGS, rows).estimate(cell(seq_len))
    assert found.peak_at_most is not None
    return (found.peak_at_most - 20 * seq_len * 256) / MIB


def scratch(*mebibytes: float, time: float = 1.0) -> list[Row]:
    """Rows whose resident meter saw so much more than the allocator's."""
    rows = [row(length, time) for length in LENGTHS[: len(mebibytes)]]
    for each, above in zip(rows, mebibytes, strict=True):
        assert each.peak_bytes is not None
        assert each.peak_bytes.allocated is not None
        each.peak_bytes.resident = each.peak_bytes.allocated + int(above * MIB)
    return rows


def test_what_to_reserve_is_the_tolerance_and_what_the_longest_two_lengths_took_past_the_allocator() -> None:
    formula = 20 * 16384 * 256 / MIB
    assert reserve(scratch(0, 0), 16384) == pytest.approx(0.03 * formula, abs=0.01)
    assert reserve(scratch(0, 0), 4096) == pytest.approx(2, abs=0.01)  # 3 % are less
    assert reserve(scratch(0, 0, 1.5, 1), 16384) == pytest.approx(0.03 * formula + 3, abs=0.01)
    assert reserve(scratch(9, 0, 0, 0), 16384) == reserve(scratch(0, 0, 0, 0), 16384)  # it does not recur
    assert reserve(scratch(3), 16384) == pytest.approx(0.15 * formula + 2 + 3 * 16, abs=0.01)  # it may begin later
    assert reserve([], 16384) == pytest.approx(0.15 * formula + 2, abs=0.01)


def test_scratch_may_begin_at_any_length_where_products_grow_and_nowhere_else() -> None:
    """A series that took nothing past the allocator at four lengths, in a run where another one took 5 MiB."""
    registry = make_registry(2)
    registry.entries["level"] = Entry(Method(name="level", build="nowhere:build", cost=level), "tests", "tests")
    other = [msgspec.structs.replace(each, method="mixed_1") for each in scratch(0, 0, 4, 5)]
    shown = [*scratch(0, 0, 0, 0), *(msgspec.structs.replace(each, method="level") for each in scratch(0, 0, 0, 1))]
    forecaster = Forecaster(registry, CEILINGS, [*other, *shown])
    formula = 20 * 16384 * 256
    reserved = {name: forecaster.estimate(cell(16384, name)).peak_at_most for name in ("mixed_0", "level")}
    assert reserved["mixed_0"] == formula + 5 * MIB  # more than 3 %
    assert reserved["level"] == pytest.approx(1.03 * formula + MIB, abs=2)  # its products stay as they are
    alone = Forecaster(registry, CEILINGS, shown).estimate(cell(16384)).peak_at_most
    assert alone == pytest.approx(1.03 * formula, abs=2)


@pytest.mark.parametrize("held", [1, 2])
def test_a_peak_without_a_formula_is_forecast_from_measured_lengths_and_never_said_to_fit_wrongly(held: int) -> None:
    """Sums of what lives together, the largest of which changes with the length; nobody knows their formulas."""
    generator = random.Random(17)
    registry, rows = make_registry(), []
    for index in range(60):
        name, cost = f"unstated_{index}", generator.choice([unstated, None])
        registry.entries[name] = Entry(Method(name=name, build="nowhere:build", cost=cost), "tests", "tests")
        a, b, c, g = (10 ** generator.uniform(low, high) for low, high in ((2, 7), (3, 4), (-2, 0), (2, 4)))
        rows += [row(n, seconds(n), name, peak=int(max(a + b * n, c * n * n, g * n))) for n in LENGTHS]
    for length in LENGTHS[1:]:
        learnt = Forecaster(registry, CEILINGS, [each for each in rows if each.seq_len < length / 2 ** (held - 1)])
        for each in (each for each in rows if each.seq_len == length):
            found, needs = learnt.estimate(cell(length, each.method)), needed(each)
            if found.peak_at_most is None:
                assert length == LENGTHS[held - 1]  # nothing shorter was measured
                continue
            assert needs is not None
            assert found.peak_bytes is not None
            assert needs <= found.peak_at_most
            assert found.peak_bytes <= 1.001 * needs or length == LENGTHS[held]  # of one length nobody knows the slope


def test_a_proportional_peak_without_a_formula_is_bounded_by_the_growth_of_its_products() -> None:
    registry = make_registry()
    registry.entries["level"] = Entry(
        Method(name="level", build="nowhere:build", cost=level_unstated), "tests", "tests"
    )
    rows = [msgspec.structs.replace(each, method="level") for each in scratch(0, 0, 0, 0)]
    found = Forecaster(registry, CEILINGS, rows).estimate(cell(16384, "level"))
    formula = 20 * 16384 * 256
    assert found.peak_bytes == pytest.approx(formula, abs=2)
    assert found.peak_at_most == pytest.approx(1.03 * formula, abs=2)
    assert fits(found, 0, int(1.02 * formula)) == "unclear"
    assert fits(found, 0, int(1.04 * formula)) == "fits"


def test_a_call_that_both_meters_watched_shows_no_scratch() -> None:
    """What the resident meter saw above the allocator's was the record of the events."""
    watched = scratch(0, 0, 50, 60, time=3.0)
    assert reserve(watched, 16384) == reserve([], 16384)
    assert [needed(each) for each in watched] == [20 * each.seq_len * 256 for each in watched]
    assert [needed(each) for each in scratch(1, 2)] == [20 * n * 256 + m * MIB for n, m in ((1024, 1), (2048, 2))]


def test_a_power_law_is_recovered() -> None:
    assert power_law(LENGTHS, [1e-6 * n**1.4 for n in LENGTHS]).exponent == pytest.approx(1.4)


def test_a_newer_parameter_at_its_default_keeps_the_series(tmp_path: Any) -> None:
    from ctxbench.registry import discover

    registry = discover()
    newest = registry["longformer"].params().as_dict()
    name = next(iter(newest))
    rows = [
        row_for(
            Cell(method="longformer", impl="blocked", seq_len=n, params={k: v for k, v in newest.items() if k != name},
                 memory=newest["window"]), "ok",
            latency_s=Latency(median=n * 1e-5, low=n * 1e-5, high=n * 1e-5, samples=[[n * 1e-5]], n_processes=1),
        )
        for n in LENGTHS[:4]
    ]  # fmt: skip
    asked = Cell(method="longformer", impl="blocked", seq_len=32768, params=newest, memory=newest["window"])
    assert Forecaster(registry, CEILINGS, rows).estimate(asked).source == FITTED
