"""Cells that are measured again fall where the run expects them, and a changed cell does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxbench.analysis import noise
from ctxbench.analysis.processes import moderated_variances
from ctxbench.analysis.runs import Run, read_run
from ctxbench.analysis.verify import check_machine, choose, prediction, verify
from ctxbench.errors import UserError
from ctxbench.run import session
from ctxbench.run.store import read_rows
from ctxbench.run.tasks import Outcome, Task


class Planted:
    """A machine of the laboratory whose processes differ by ``sigma``; ``factor(cell)`` makes cells slower."""

    def __init__(self, lab: Any, sigma: float = 0.03, seed: int = 0):
        self.lab, self.random = lab, np.random.default_rng(seed)
        self.sigma, self.factor = sigma, lambda cell: 1.0
        self.config = lab.config(methods="square,window", impls="reference,fast", seq_len="1k..64k")

    def measure(self, name: str, only: set[str] | None = None, behaviour: Any = None) -> Run:
        def law(cell: Any) -> float:
            return 1e-6 * cell.seq_len * self.factor(cell) * math.exp(self.random.normal(0, self.sigma))

        machine = self.lab.machine(law)
        if behaviour is not None:
            machine.behaviour = behaviour
        folder = self.lab.folder / name
        session.execute(self.config, self.lab.registry, folder, "test", make_executor=machine.make, only=only)
        self.tasks = machine.tasks
        return read_run(folder)


@pytest.fixture
def planted(lab: Any) -> Planted:
    return Planted(lab)


def test_only_the_chosen_cells_are_measured_again_each_in_its_processes(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 4, seed=1)
    again = planted.measure("again", {row.cell for row in chosen})
    assert {row.cell for row in again.rows} == {row.cell for row in chosen}
    timed = [task.cell.key for task in planted.tasks if task.kind == "time"]
    assert sorted(timed) == sorted([row.cell for row in chosen] * 3)
    assert read_rows(then.folder) == list(then.rows)


def test_cells_of_the_same_code_fall_inside(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 99, seed=0)
    again = planted.measure("again", {row.cell for row in chosen})
    found = verify(then, chosen, again.rows, "again", seed=0)
    assert found.judged == len(chosen) > 15
    assert found.inside >= 0.9 * found.judged
    assert not found.failed
    assert all(cell.same_peak and cell.low < cell.then_s < cell.high for cell in found.cells)


def test_cells_that_became_slower_fall_outside_and_fail_the_run(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 99, seed=0)
    planted.factor = lambda cell: 1.5 if cell.method == "square" else 1.0
    again = planted.measure("again", {row.cell for row in chosen})
    found = verify(then, chosen, again.rows, "again", seed=0)
    assert {cell.method for cell in found.cells if not cell.inside} >= {"square"}
    assert all(not cell.inside for cell in found.cells if cell.method == "square")
    assert found.failed


def test_a_cell_that_ran_beside_other_work_is_shown_and_not_judged(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 6, seed=2)
    planted.factor = lambda cell: 3.0
    again = planted.measure("again", {row.cell for row in chosen})
    for row in again.rows:
        row.latency_s.contended = [True] * len(row.latency_s.samples)
    found = verify(then, chosen, again.rows, "again", seed=2)
    assert (found.judged, found.failed) == (0, False)
    assert all(not cell.inside and cell.disturbed and "beside it now" in cell.reason for cell in found.cells)


def test_a_cell_that_fails_now_fails_the_run_and_one_that_is_gone_is_said_to_be(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 3, seed=5)

    def lost(task: Task) -> Outcome | None:
        wanted = task.cell is not None and task.cell.key == chosen[0].cell and task.kind == "time"
        return Outcome(status="error", reason="planted") if wanted else None

    again = planted.measure("again", {row.cell for row in chosen[:2]}, lost)
    found = verify(then, chosen, again.rows, "again", seed=5)
    assert [cell.status for cell in found.cells] == ["error", "ok", "absent"]
    assert [cell.inside for cell in found.cells] == [None, True, None]
    assert "plans no such cell" in found.cells[2].reason
    assert found.failed


def test_a_prediction_interval_holds_a_second_measurement_in_95_percent() -> None:
    random, inside, trials = np.random.default_rng(0), 0, 0
    for _ in range(60):
        cells = [np.exp(random.normal(0, 0.05, 3)) for _ in range(20)]
        variances, freedom = moderated_variances([np.log(cell) for cell in cells])
        for cell, variance, dof in zip(cells, variances, freedom, strict=True):
            low, high = prediction(cell, variance, dof, 3)
            inside += low <= np.exp(random.normal(0, 0.05, 3).mean()) <= high
            trials += 1
    assert 0.95 <= inside / trials <= 0.99


def test_without_any_replicate_there_is_no_interval() -> None:
    assert prediction(np.array([1.0]), math.nan, 0, 3) is None


def test_a_stored_noise_floor_widens_the_intervals(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 1, seed=0)
    again = planted.measure("again", {chosen[0].cell})
    narrow = verify(then, chosen, again.rows, "again", seed=0)
    noise.calibrate(noise.identity(then.info, "cpu"), [(0.01, 1.1)] * 6, ["a", "a2"])
    wide = verify(then, chosen, again.rows, "again", seed=0)
    assert (narrow.floor, wide.floor) == (None, pytest.approx(0.1))
    assert wide.cells[0].high / narrow.cells[0].high == pytest.approx(1.1)


def test_the_choice_follows_the_seed_and_never_takes_unmeasured_cells(planted: Planted) -> None:
    then = planted.measure("run")
    first, second = choose(then, 5, seed=3), choose(then, 5, seed=3)
    assert [row.cell for row in first] == [row.cell for row in second]
    assert {row.cell for row in first} != {row.cell for row in choose(then, 5, seed=4)}
    failed = Run(Path("none"), tuple(row for row in then.rows if not row.measured))
    with pytest.raises(UserError, match="no measured cell"):
        choose(failed, 5, seed=3)


def test_another_machine_is_refused(planted: Planted) -> None:
    then = planted.measure("run")
    check_machine(then, then.info, then.rows)
    other = {"environment": {"cpu": {"model": "There", "cores_usable": 64}}}
    with pytest.raises(UserError, match=r"another machine: cpu .*, here There.*\n.*compare --normalise"):
        check_machine(then, other, then.rows)


def test_a_machine_at_another_speed_moves_what_is_expected_and_hides_no_slower_code(restless_host: Any) -> None:
    host = restless_host(0.7, sigma=0.02, seed=3)
    measure = lambda factor, off: [  # noqa: E731
        host.row(factor * 0.01, host.random.normal(off, 0.05, 4), 256 * (index + 1)) for index in range(24)
    ]
    then = Run(Path("then"), tuple(measure(1.0, 0.0)))
    found = verify(then, then.rows, measure(1.0, 0.3), "again", seed=0)
    assert found.judged == 24
    assert found.raw_inside < 0.5 * found.judged
    assert found.inside >= 0.9 * found.judged
    assert not found.failed
    assert np.mean([cell.speed for cell in found.cells]) == pytest.approx(math.exp(0.3), rel=0.05)
    assert all(cell.raw_low < cell.low < cell.now_s for cell in found.cells if cell.inside)
    worse = verify(then, then.rows, measure(1.5, 0.3), "again", seed=0)
    assert (worse.inside, worse.failed) == (0, True)
    unchanged = verify(then, then.rows, measure(1.0, 0.0), "again", seed=0)
    widths = [(math.log(cell.high / cell.low), math.log(cell.raw_high / cell.raw_low)) for cell in unchanged.cells]
    assert np.mean([narrow < wide for narrow, wide in widths]) > 0.9  # the spread of the machine is not the program's


def test_cells_that_follow_the_reference_unequally_are_inside_in_95_percent(restless_host: Any) -> None:
    inside = judged = 0
    for seed in range(8):
        hosts = [restless_host(0.0, sigma=0.02, seed=100 * seed + index) for index in range(24)]
        for host in hosts:
            host.coefficient = host.random.normal(0.65, 0.3)
        measure = lambda off, hosts=hosts: [  # noqa: E731
            host.row(0.01, host.random.normal(off, 0.08, 3), 256 * (i + 1)) for i, host in enumerate(hosts)
        ]
        then = Run(Path("then"), tuple(measure(0.0)))
        found = verify(then, then.rows, measure(0.2 * (seed % 3 - 1)), "again", seed=seed)
        inside, judged = inside + found.inside, judged + found.judged
    assert inside / judged >= 0.95


def test_without_the_reference_beside_the_samples_nothing_is_said_of_speed(planted: Planted) -> None:
    then = planted.measure("run")
    chosen = choose(then, 6, seed=0)
    found = verify(then, chosen, planted.measure("again", {row.cell for row in chosen}).rows, "again", seed=0)
    assert found.raw_inside is None
    assert all((cell.speed, cell.raw_low, cell.raw_high) == (None, cell.low, cell.high) for cell in found.cells)
