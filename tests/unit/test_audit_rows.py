"""The audit of a run finds what the rows contradict, and nothing in rows that agree."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ctxbench.analysis.audit import FLOPS_GROWTH, HOLDS, NOT_APPLICABLE, NOT_CLAIMED, PEAK_GROWTH, TIME_GROWTH, VIOLATED
from ctxbench.analysis.audit_rows import PROBES, audit_rows
from ctxbench.cell import Cell
from ctxbench.registry import discover
from ctxbench.rows import Counted, Flops, Gate, Latency, PeakBytes, Row, StateBytes, row_for

LENGTHS = (1024, 2048, 4096, 8192)
PASSED = dict.fromkeys(PROBES, "passed")


def row(length: int, **changes) -> Row:
    """A linear method whose every number agrees."""
    flops, peak, seconds = 1000 * length, 40_000 * length, 1e-6 * length
    fields = {
        "latency_s": Latency(
            median=seconds, low=0.98 * seconds, high=1.02 * seconds, samples=[[seconds]], n_processes=5
        ),
        "flops": Flops(algorithmic=flops, formula=flops, counted=flops, coverage=1.0),
        "peak_bytes": PeakBytes(allocated=peak, resident=peak, traced=peak, formula=peak, agree=True),
        "state_bytes": StateBytes(measured=64, formula=64),
        "num_parameters": Counted(measured=10, formula=10),
        "gate": Gate(ok=True, probes=PASSED),
    }
    return row_for(
        Cell(method="made_up", impl="reference", mode="stream", seq_len=length), "ok", **{**fields, **changes}
    )


def verdicts(rows: list[Row], methods=None) -> dict[str, object]:
    return {verdict.term: verdict for verdict in audit_rows(rows, methods)}


def wrong(rows: list[Row]) -> list[str]:
    return [term for term, verdict in verdicts(rows).items() if not verdict.ok]


def rows(**changes) -> list[Row]:
    """The same with fields replaced by functions of the length."""
    return [row(length, **{name: make(length) for name, make in changes.items()}) for length in LENGTHS]


def peak(length: int, seen: int, **changes) -> PeakBytes:
    return PeakBytes(
        **{"allocated": seen, "resident": seen, "traced": seen, "formula": 40_000 * length, "agree": True} | changes
    )


def test_rows_that_agree_hold_in_every_term() -> None:
    found = verdicts(rows())
    assert {verdict.verdict for verdict in found.values()} == {HOLDS}
    assert found["FLOPs"].evidence.startswith("4 of 4 cells agree")


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        ({"flops": lambda n: Flops(formula=1000 * n, counted=1000 * n + (n == 4096))}, ["FLOPs"]),
        (
            {"flops": lambda n: Flops(formula=1000 * n, counted=n * n)},
            ["FLOPs", FLOPS_GROWTH],
        ),
        ({"flops": lambda n: Flops(algorithmic=2000 * n, formula=1000 * n, counted=1000 * n)}, ["algorithmic FLOPs"]),
        ({"state_bytes": lambda n: StateBytes(measured=n, formula=64)}, ["state bytes"]),
        ({"num_parameters": lambda n: Counted(measured=11, formula=10)}, ["parameters"]),
        (
            {"peak_bytes": lambda n: peak(n, 40_000 * n + 8 * n * n)},
            ["peak memory, traced", "peak memory, allocated", PEAK_GROWTH],
        ),
        ({"peak_bytes": lambda n: peak(n, 50_000 * n, traced=40_000 * n)}, ["peak memory, allocated"]),
    ],
    ids=[
        "one FLOP",
        "quadratic FLOPs",
        "less than needed",
        "state that grows",
        "parameters",
        "hidden square",
        "more than traced",
    ],
)  # fmt: skip
def test_a_contradiction_is_found(changes, terms: list[str]) -> None:
    assert wrong(rows(**changes)) == terms


def test_the_farthest_cell_is_named_with_its_error() -> None:
    verdict = verdicts(rows(flops=lambda n: Flops(formula=1000 * n, counted=1000 * n + (500 * n if n == 2048 else 0))))
    assert verdict["FLOPs"].evidence.startswith("3 of 4 cells agree; the farthest, ")
    assert verdict["FLOPs"].evidence.endswith("at 2k: +50.00%")


def test_a_small_difference_of_peaks_is_none() -> None:
    assert wrong(rows(peak_bytes=lambda n: peak(n, 40_000 * n + 1_000_000))) == []


def test_resident_memory_alone_contradicts_no_formula() -> None:
    found = verdicts(rows(peak_bytes=lambda n: peak(n, 40_000 * n, resident=90_000 * n, agree=False)))
    assert found["peak memory, resident"].verdict == NOT_APPLICABLE
    assert "0 of 4 cells agree" in found["peak memory, resident"].evidence


def latency(seconds: float, spread: float = 0.02) -> Latency:
    low, high = seconds * (1 - spread), seconds * (1 + spread)
    return Latency(median=seconds, low=low, high=high, samples=[[seconds]], n_processes=5)


def test_times_that_grow_as_a_square_contradict_linear_work() -> None:
    found = verdicts(rows(latency_s=lambda n: latency(1e-9 * n * n)))[TIME_GROWTH]
    assert found.verdict == VIOLATED
    assert found.claimed == "T^1.00 T^1.00"
    assert found.seen == "T^2.00 T^2.00"


@pytest.mark.parametrize(
    "seconds",
    [lambda n: 1e-6 * n**1.3, lambda n: 1e-9 * n * n if n == 8192 else 1e-6 * n, lambda n: 1e-3 + 1e-9 * n],
    ids=["caches left behind", "one slow cell", "overhead"],
)
def test_times_that_machines_explain_are_no_contradiction(seconds) -> None:
    assert wrong(rows(latency_s=lambda n: latency(seconds(n)))) == []


def test_uncertain_times_contradict_nothing() -> None:
    assert wrong(rows(latency_s=lambda n: latency(1e-9 * n * n, spread=0.5))) == []


def test_a_failed_probe_names_its_cell_and_what_the_gate_said() -> None:
    message = "the gate failed at T = 64\n  causality: changing the tokens from 5 on changed 3 earlier outputs"
    gate = Gate(ok=False, probes={**PASSED, "causality": "failed"}, message=message)
    found = verdicts([row(1024), row(2048, gate=gate)])
    assert found["causality"].verdict == VIOLATED
    assert "changed 3 earlier outputs" in found["causality"].evidence
    assert found["batch independence"].verdict == HOLDS


def test_a_defect_that_is_declared_and_seen_holds_and_one_that_is_absent_does_not() -> None:
    seen = Gate(ok=True, probes={**PASSED, "causality": "failed"}, message="fails as declared: causality")
    absent = Gate(ok=False, probes=PASSED, message="the gate failed\n  causality: declared as a defect, but it passed")
    assert verdicts(rows(gate=lambda n: seen))["causality"].verdict == HOLDS
    assert wrong(rows(gate=lambda n: absent)) == ["causality"]


def test_an_output_of_another_shape_is_a_contradiction_of_shapes() -> None:
    gate = Gate(ok=False, probes={"output": "failed"}, message="the output has shape (1, 2)")
    found = verdicts(rows(gate=lambda n: gate))
    assert found["shapes"].verdict == VIOLATED
    assert found["causality"].verdict == NOT_APPLICABLE


def test_rows_without_numbers_are_not_applicable_and_without_formulas_not_claimed() -> None:
    empty = dict.fromkeys(("latency_s", "flops", "peak_bytes", "state_bytes", "num_parameters", "gate"))
    bare = verdicts([row(1024, **empty)])
    assert {verdict.verdict for verdict in bare.values()} == {NOT_APPLICABLE}
    unclaimed = verdicts(rows(flops=lambda n: Flops(counted=n), peak_bytes=lambda n: PeakBytes(traced=n, allocated=n)))
    for term in ("FLOPs", "peak memory, traced", FLOPS_GROWTH, PEAK_GROWTH, TIME_GROWTH):
        assert unclaimed[term].verdict == NOT_CLAIMED, term


def test_series_of_other_sizes_are_not_read_as_growth() -> None:
    """Two widths at different lengths would look like a steep curve."""
    wide = [replace(row(n, flops=Flops(formula=99_000 * n, counted=99_000 * n)), d_model=1024) for n in (16384, 32768)]
    assert wrong([*rows(), *wide]) == []


def test_a_known_method_bounds_growth_by_the_highest_power_of_its_formula() -> None:
    """Times of dense attention may grow as a square at lengths where its FLOPs do not yet."""
    square = rows(latency_s=lambda n: latency(1e-9 * n**1.9))
    dense = [replace(each, method="dense", mode="forward") for each in square]
    assert verdicts(dense, {"dense": discover()["dense"]})[TIME_GROWTH].verdict == HOLDS
    assert verdicts(dense)[TIME_GROWTH].verdict == VIOLATED
