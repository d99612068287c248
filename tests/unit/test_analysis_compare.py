"""Verdicts on planted runs: identical code, injected slow-downs, machines that changed, processes that are too few."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from ctxbench.analysis import noise, ranks
from ctxbench.analysis.compare import ALPHA, Comparison, Side, Verdict, compare, least_processes
from ctxbench.analysis.processes import moderated_variances, pace, processes
from ctxbench.analysis.runs import Run
from ctxbench.cell import Cell
from ctxbench.errors import UserError
from ctxbench.rows import Gate, Latency, Row, row_for
from ctxbench.text import Warn

HERE = {"cpu": {"model": "Here", "cores_usable": 2}, "memory": {"total_bytes": 2**34}}
THERE = {"cpu": {"model": "There", "cores_usable": 8}, "memory": {"total_bytes": 2**36}}
FIRST = Cell(method="m", impl="i", seq_len=1024)


class Bench:
    """Draws runs: processes spread by ``sigma``, samples within one by 2 %, reference kernels by 2 %."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)

    def row(
        self, cell: Cell = FIRST, count: int = 8, sigma: float = 0.01, seconds: float = 0.01, speed: float = 1.0,
        status: str = "ok", restless: float = 0.0, **changes: Any,
    ) -> Row:  # fmt: skip
        spread = lambda width: math.exp(self.random.normal(0, width))  # noqa: E731
        samples, sensors = [], []
        for _ in range(count):
            median, pace = seconds * speed * spread(sigma), spread(restless)
            samples.append([median * pace * spread(0.02) for _ in range(9)])
            beats = [[taken, 1e-3 * speed * pace * spread(0.01)] for taken in range(10)]
            sensors.append({"reference_beside_s": beats} if restless else {})
        sensors = [
            process
            | {
                "reference_matmul_s": [1e-4 * speed * spread(0.02)] * 2,
                "reference_copy_s": [3e-4 * speed * spread(0.02)] * 2,
            }
            for process in sensors
        ]
        medians = [float(np.median(values)) for values in samples]
        latency = Latency(
            median=float(np.median(medians)), low=min(medians), high=max(medians), samples=samples, n_processes=count
        )
        fields = {"latency_s": latency, "gate": Gate(ok=True), "env_delta": {"processes": sensors}, **changes}
        return row_for(cell, status, **fields)

    def run(self, *rows: Row, name: str = "run", environment: Any = HERE, **header: Any) -> Run:
        return Run(Path("/nowhere") / name, rows or (self.row(),), {"environment": environment, **header})

    def pair(self, slower: float = 1.0, **settings: Any) -> Comparison:
        a, b = self.row(**settings), self.row(**{**settings, "seconds": slower * settings.get("seconds", 0.01)})
        return compare(Side(self.run(a, name="a")), Side(self.run(b, name="b")))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_of_200_comparisons_of_identical_code_at_most_2_find_a_difference(bench):
    found: Counter[str] = Counter()
    for sigma, _ in itertools.product((0.005, 0.01, 0.02, 0.07), range(50)):
        found.update(bench.pair(sigma=sigma).counts())
    assert found["faster"] + found["slower"] <= 2
    assert found["same"] > 40


def test_8_processes_find_a_slowdown_of_5_percent_in_9_of_10_cases(bench):
    found: Counter[str] = Counter()
    for _ in range(100):
        found.update(bench.pair(slower=1.05, sigma=0.015).counts())
    assert found["slower"] >= 90


def test_a_restless_machine_hides_no_slowdown_whose_reference_was_timed_beside_the_samples(bench):
    settings = {"sigma": 0.012, "restless": 0.08}
    same, slower = Counter(), Counter()
    for _ in range(100):
        same.update(bench.pair(**settings).counts())
        (cell,) = bench.pair(slower=1.05, **settings).cells
        slower[cell.verdict] += 1
        assert 0.3 < cell.adjusted < 1.7
    assert same["faster"] + same["slower"] <= 1
    assert slower["slower"] >= 90
    assert sum(bench.pair(slower=1.05, sigma=0.08).cells[0].verdict == "slower" for _ in range(100)) < 30


def test_the_adjusted_test_keeps_its_level_and_its_interval_the_truth_whatever_the_covariate_explains():
    random, trials = np.random.default_rng(3), 2000
    for truth in (0.0, 0.8):
        false = inside = 0
        for _ in range(trials):
            x = 0.1 * random.standard_t(3, 16)  # heavy tails: bursts of other guests
            y = np.exp(truth * x + random.normal(0, 0.02, 16))
            false += ranks.adjusted(y[:8], y[8:], x[:8], x[8:]).p <= ALPHA
            shift = ranks.adjusted(y[:8], 1.2 * y[8:], x[:8], x[8:]).shift
            inside += shift.low <= 1.2 <= shift.high
            assert shift.low <= shift.ratio <= shift.high
        assert false / trials <= ALPHA + 2.6 * math.sqrt(ALPHA / trials)
        assert 0.935 <= inside / trials <= 0.985


def test_an_adjusted_interval_is_where_its_own_test_turns():
    random = np.random.default_rng(4)
    x = random.normal(0, 0.1, 16)
    y = np.exp(x + random.normal(0, 0.02, 16))
    shift = ranks.adjusted(y[:8], y[8:], x[:8], x[8:]).shift
    p = {ratio: ranks.adjusted(y[:8], y[8:] / ratio, x[:8], x[8:]).p for ratio in (shift.low, shift.high)}
    for ratio, outwards in ((shift.low, 1 - 1e-9), (shift.high, 1 + 1e-9)):
        assert p[ratio] > 1 - shift.confidence
        assert ranks.adjusted(y[:8], y[8:] / (ratio * outwards), x[:8], x[8:]).p <= 1 - shift.confidence + 1e-12


def test_a_covariate_that_parts_the_groups_invents_nothing_and_one_that_stands_still_changes_nothing():
    a, b = np.linspace(1, 1.02, 8), np.linspace(1.2, 1.22, 8)
    slow = ranks.adjusted(a, b, np.log(a), np.log(b))
    assert slow.p > 0.5
    assert (slow.shift.low, slow.shift.high) == (0.0, math.inf)
    still = ranks.adjusted(a, b, np.zeros(8), np.zeros(8))
    assert (still.coefficient, still.p) == (0, ranks.rank_test(a, b))
    assert still.shift == pytest.approx(ranks.hodges_lehmann(a, b))


def test_a_sample_is_held_against_the_references_on_both_its_sides():
    beats = [[0, 1.0], [2, 3.0], [3, 5.0]]
    assert pace([2.0, 2.0, 4.0], beats) == pytest.approx(math.log(2.0))  # ratios 1, 1, 1 of a median of 2
    assert pace([6.0, 6.0, 6.0], [[0, 2.0], [3, 2.0]]) == pytest.approx(math.log(2.0))


def test_one_report_over_many_identical_cells_accuses_none(bench):
    cells = [Cell(method="m", impl="i", seq_len=1024 * (1 + index)) for index in range(40)]
    a, b = (bench.run(*(bench.row(cell, sigma=0.03) for cell in cells), name=name) for name in "ab")
    assert not {"faster", "slower"} & set(compare(Side(a), Side(b)).counts())


def test_three_processes_decide_nothing_and_say_how_many_would(bench):
    (cell,) = bench.pair(slower=3.0, count=3).cells
    assert (cell.verdict, cell.p_holm) == (Verdict.UNCLEAR, None)
    assert "3 processes a side cannot reach 1 %; 5 would" in cell.reason
    assert cell.ratio == pytest.approx(3, rel=0.05)
    assert cell.confidence == pytest.approx(0.9)


@pytest.mark.parametrize(("cells", "needed"), [(1, 5), (10, 7), (100, 9)])
def test_the_number_of_processes_that_could_decide_grows_with_the_cells(cells, needed):
    assert least_processes(cells) == needed
    assert ranks.smallest_p(needed, needed) <= ALPHA / cells < ranks.smallest_p(needed - 1, needed - 1)


def test_cells_that_cannot_be_decided_do_not_weaken_the_others(bench):
    cells = [Cell(method="m", impl="i", seq_len=1024 * (1 + index)) for index in range(60)]
    sides = []
    for name, factor in (("a", 1.0), ("b", 1.5)):
        few = [bench.row(cell, count=3) for cell in cells[1:]]
        sides.append(Side(bench.run(bench.row(cells[0], count=5, seconds=0.01 * factor), *few, name=name)))
    found = compare(*sides).cells
    assert found[0].verdict is Verdict.SLOWER
    assert found[0].p_holm == pytest.approx(2 / math.comb(10, 5))


@pytest.mark.parametrize(("slower", "verdict"), [(0.5, Verdict.FASTER), (1.0, Verdict.SAME), (2.0, Verdict.SLOWER)])
def test_verdicts_have_directions(bench, slower, verdict):
    (cell,) = bench.pair(slower=slower, sigma=0.003).cells
    assert cell.verdict is verdict
    assert cell.ratio == pytest.approx(slower, rel=0.01)


def test_a_clear_difference_below_the_noise_floor_is_no_verdict(bench):
    noise.calibrate(noise.identity({"environment": HERE}, "cpu"), [(0.01, 1 + 0.01 * k) for k in range(8)], ["a", "a2"])
    (cell,) = bench.pair(slower=1.06, sigma=0.005).cells
    assert cell.floor > 0.06
    assert (cell.verdict, "inside the noise floor" in cell.reason) == (Verdict.UNCLEAR, True)
    (cell,) = bench.pair(slower=1.3, sigma=0.005).cells
    assert cell.verdict is Verdict.SLOWER


def test_a_machine_that_became_slower_is_not_blamed_on_the_code(bench):
    a, b = bench.run(bench.row(), name="a"), bench.run(bench.row(speed=1.2), name="b")
    (cell,) = compare(Side(a), Side(b)).cells
    assert cell.ratio == pytest.approx(1.2, rel=0.02)
    assert (cell.verdict, "may be the machine" in cell.reason) == (Verdict.UNCLEAR, True)
    worse = bench.run(bench.row(speed=1.2, seconds=0.02), name="b")
    (cell,) = compare(Side(a), Side(worse)).cells
    assert (cell.verdict, cell.normalised) == (Verdict.SLOWER, True)


def test_work_beside_one_of_two_runs_decides_nothing_but_hits_both_impls_of_one_run(bench):
    quiet, busy = bench.row(), bench.row(seconds=0.02)
    busy.latency_s.contended = [True] * 8
    (cell,) = compare(Side(bench.run(quiet, name="a")), Side(bench.run(busy, name="b"))).cells
    assert (cell.verdict, cell.disturbed) == (Verdict.UNCLEAR, "B")
    assert "other work ran beside B" in cell.reason
    few = bench.row(count=3)
    few.latency_s.contended = [True] * 3
    (cell,) = compare(Side(bench.run(few, name="a")), Side(bench.run(bench.row(count=3), name="b"))).cells
    assert cell.reason.endswith("5 would; other work ran beside A")
    other = bench.row(Cell(method="m", impl="j", seq_len=1024))
    run = bench.run(other, busy)
    assert compare(Side(run, "j"), Side(run, "i")).cells[0].verdict is Verdict.SLOWER


def test_a_reference_kernel_that_merely_scatters_raises_no_suspicion(bench):
    a, b = bench.row(), bench.row(seconds=0.015)
    for row, times in ((a, (1, 2, 3, 4, 5, 6, 7, 8)), (b, (8, 7, 6, 5, 5, 5, 2, 1))):
        for process, seconds in zip(row.env_delta["processes"], times, strict=True):
            process["reference_copy_s"] = [seconds, seconds]
    (cell,) = compare(Side(bench.run(a, name="a")), Side(bench.run(b, name="b"))).cells
    assert cell.speed["copy"] > 1.1
    assert (cell.verdict, cell.normalised) == (Verdict.SLOWER, False)


def test_different_machines_are_refused_or_compared_in_units_of_the_reference_kernels(bench):
    a = bench.run(bench.row(), name="a")
    b = bench.run(bench.row(speed=0.3, seconds=0.02), name="b", environment=THERE)
    with pytest.raises(UserError, match=r"different machines: cpu Here and There.*\n.*--normalise"):
        compare(Side(a), Side(b))
    found = compare(Side(a), Side(b), normalise=True)
    (cell,) = found.cells
    assert cell.ratio == pytest.approx(2, rel=0.05)  # in seconds B is faster, in units of its machine twice as slow
    assert (cell.verdict, cell.normalised) == (Verdict.SLOWER, True)
    assert "different machines" in found.notes[0]


def test_reference_kernels_that_contradict_each_other_leave_it_unclear(bench):
    def one_sided(row: Row) -> Row:
        for process in row.env_delta["processes"]:
            process["reference_copy_s"] = [10 * seconds for seconds in process["reference_copy_s"]]
        return row

    a = bench.run(bench.row(), name="a")
    b = bench.run(one_sided(bench.row(seconds=0.03)), name="b", environment=THERE)
    (cell,) = compare(Side(a), Side(b), normalise=True).cells  # three times slower by one kernel, faster by the other
    assert cell.verdict is Verdict.UNCLEAR


def test_without_reference_kernels_other_machines_are_invalid(bench):
    a = bench.run(bench.row(env_delta={}), name="a")
    b = bench.run(bench.row(), name="b", environment=THERE)
    (cell,) = compare(Side(a), Side(b), normalise=True).cells
    assert (cell.verdict, "no times of the reference kernels" in cell.reason) == (Verdict.INVALID, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "oom", "latency_s": None, "reason": "asked for 9 GiB"}, "B is oom: asked for 9 GiB"),
        ({"status": "gate_failed"}, "B is gate_failed"),
        ({"gate": None}, "B was timed without a passed gate"),
        ({"warnings": [Warn.CHECKSUM("1 to 2")]}, "B gave another output"),
    ],
    ids=["oom", "gate_failed", "no gate", "checksum"],
)
def test_a_side_without_a_checked_number_is_invalid(bench, changes, reason):
    a, b = bench.run(bench.row(), name="a"), bench.run(bench.row(**changes), name="b")
    found = compare(Side(a), Side(b))
    assert found.cells[0].verdict is Verdict.INVALID
    assert found.cells[0].reason.startswith(reason)
    assert bool(found.broken()) == (changes.get("status") is not None)


def test_two_impls_of_one_run_are_compared_where_everything_else_is_equal(bench):
    cells = [Cell(method="m", impl=impl, seq_len=length) for impl in ("slow", "fast") for length in (1024, 2048)]
    run = bench.run(*(bench.row(cell, seconds=0.02 if cell.impl == "slow" else 0.01) for cell in cells))
    found = compare(Side(run, "slow"), Side(run, "fast"))
    assert [(cell.impl, cell.seq_len, cell.verdict) for cell in found.cells] == [
        ("slow > fast", 1024, Verdict.FASTER),
        ("slow > fast", 2048, Verdict.FASTER),
    ]
    with pytest.raises(UserError, match=r"unknown impl of run 'fats'; did you mean 'fast'"):
        compare(Side(run, "slow"), Side(run, "fats"))


def test_cells_of_one_side_are_named_and_nothing_in_common_is_an_error(bench):
    other = Cell(method="m", impl="i", seq_len=4096)
    a, b = bench.run(bench.row(), bench.row(other), name="a"), bench.run(bench.row(), name="b")
    assert compare(Side(a), Side(b)).only_a == [other.key]
    with pytest.raises(UserError, match="no cell in common"):
        compare(Side(bench.run(bench.row(other), name="c")), Side(b))


def test_other_software_is_noted(bench):
    a = bench.run(versions={"torch": "2.13.0", "packages": {"ctxbench": "0.1.0"}}, name="a")
    b = bench.run(versions={"torch": "2.14.0", "packages": {"ctxbench": "0.1.0"}}, name="b")
    assert "the software differs: torch 2.13.0 and 2.14.0" in compare(Side(a), Side(b)).notes


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 3), (5, 8), (8, 8), (2, 13)])
def test_the_rank_test_is_the_exact_one_of_scipy(bench, m, n):
    for shift in (0, 0.5, 3):
        a, b = bench.random.normal(size=m), bench.random.normal(shift, size=n)
        assert ranks.rank_test(a, b) == pytest.approx(mannwhitneyu(a, b, method="exact").pvalue)


def test_ties_speak_against_a_difference():
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 9])
    assert ranks.rank_test(a, b) > ranks.rank_test(a, b + 0.1)
    assert ranks.rank_test(a, a) == 1.0


def test_the_interval_of_the_ratio_has_the_confidence_it_states(bench):
    inside = confidence = 0.0
    for _ in range(1000):
        a, b = np.exp(bench.random.normal(size=5)), 2 * np.exp(bench.random.normal(size=6))
        shift = ranks.hodges_lehmann(a, b)
        inside, confidence = inside + (shift.low <= 2 <= shift.high), shift.confidence
    assert confidence >= 0.95
    assert inside / 1000 == pytest.approx(confidence, abs=0.02)


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests():
    assert ranks.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_floor_follows_the_length_of_a_call():
    floor = noise.build_floor([(1e-3, [0.1, 0.1])] * 6 + [(1.0, [0.01])] * 6 + [(100.0, [0.5])])
    assert (floor.at(2e-3), floor.at(5.0)) == pytest.approx((0.1, 0.01))
    assert floor.at(100.0) == floor.overall  # one cell of this size says nothing
    assert noise.build_floor([(1.0, [])]) is None


def test_a_calibration_needs_a_known_machine_and_enough_cells():
    with pytest.raises(UserError, match="needs 6 cells, received 1"):
        noise.calibrate({"cpu": "Here"}, [(1.0, 1.0)], [])
    with pytest.raises(UserError, match="does not say which machine"):
        noise.calibrate({}, [(1.0, 1.0)] * 6, [])
    assert noise.load({"cpu": "Here"}) is None


def test_contended_processes_are_left_out_while_two_quiet_ones_remain(bench):
    row = bench.row(count=4)
    row.latency_s.contended = [False, True, False, False]
    assert (len(processes(row).medians), len(processes(row).references["copy"])) == (3, 3)
    row.latency_s.contended = [True, True, True, False]
    assert len(processes(row).medians) == 4
    assert processes(row).disturbed


def test_a_moderated_variance_lies_between_its_own_and_the_common_one():
    groups = [np.array([0.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])]
    variances, dof = moderated_variances(groups)
    assert list(variances) == pytest.approx([(2 * 4 + 4 * 2) / 6, 4 * 2 / 6])
    assert list(dof) == [4, 4]
    assert np.isnan(moderated_variances([np.array([1.0])])[0]).all()
