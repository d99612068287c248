"""From a plan to a finished run folder, on a machine whose costs are planted and whose clock is its own."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ctxbench.cell import Cell
from ctxbench.errors import Exit
from ctxbench.rows import FAILURES, Gate, Row
from ctxbench.run.progress import Progress
from ctxbench.run.tasks import Memory, Outcome, Task
from ctxbench.text import kind_of


def at(rows: list[Row], **wanted: Any) -> Row:
    (found,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return found


def codes(row: Row) -> set[str]:
    return {kind_of(warning).code for warning in row.warnings}


def test_a_quiet_run_fills_every_field_of_every_row(lab: Any) -> None:
    machine = lab.machine()
    summary = lab.run(machine, lab.config(methods="square", seq_len="1k,2k"))
    assert summary.counts() == {"ok": 2}
    assert summary.exit_code == Exit.OK
    row = at(summary.rows, seq_len=2048)
    assert row.latency_s.median == pytest.approx(2e-8 * 2048**2)
    assert row.latency_s.n_processes == 3
    assert row.tokens_per_s == pytest.approx(2048 / row.latency_s.median)
    assert row.peak_bytes.allocated == row.peak_bytes.resident == row.peak_bytes.formula == 4 * 2048**2
    assert row.peak_bytes.agree is True
    assert (row.flops.algorithmic, row.flops.formula, row.flops.counted) == (4 * 256 * 2048**2,) * 3
    assert (row.num_parameters.measured, row.num_parameters.formula, row.state_bytes.formula) == (1000, 1000, 0)
    assert row.gate == Gate(ok=True, error=0.0, tolerance=1e-6, stands_for=True)
    assert row.forecast.basis.startswith("formula, scaled from 1k")
    assert row.elapsed_s > 0
    assert row.warnings == []


def test_the_first_process_is_gated_and_followed_by_the_memory_process(lab: Any) -> None:
    machine = lab.machine()
    lab.run(machine, lab.config(seq_len="1k"))
    assert [kind for kind, *_ in machine.rounds()] == ["time", "memory", "time", "time"]
    assert [task.gate for task in machine.tasks] == [True, False, False, False]
    assert [task.process for task in machine.tasks if task.kind == "time"] == [0, 1, 2]
    assert machine.tasks[2].expected_s == pytest.approx(2e-8 * 1024**2)


def test_gates_that_passed_are_shown_to_the_longer_cells_of_their_series(lab: Any) -> None:
    machine = lab.machine()
    lab.run(machine, lab.config(methods="square,window", seq_len="1k..4k"))
    shown = {(task.cell.method, task.cell.seq_len): len(task.passed) for task in machine.tasks if task.gate}
    for method in ("square", "window"):
        assert [shown[method, length] for length in (1024, 2048, 4096)] == [0, 1, 1]
    assert not any(task.passed for task in machine.tasks if not task.gate)

    def refuse(task: Task) -> Outcome | None:
        gate = Gate(ok=False, message="differs")
        return Outcome(status="gate_failed", gate=gate, elapsed_s=0.1) if task.kind == "time" else None

    machine = lab.machine()
    machine.behaviour = refuse
    lab.run(machine, lab.config(methods="square", seq_len="1k..4k"), folder="refused")
    assert [len(task.passed) for task in machine.tasks] == [0, 0, 0]  # what failed stands for nothing


def test_the_tracer_s_engine_is_told_to_the_longer_cells_of_its_series(lab: Any) -> None:
    machine = lab.machine()

    def compared(task: Task) -> Outcome | None:
        if task.kind != "memory":
            return None
        outcome = machine.remembered(task)
        outcome.memory.engine = "meta" if task.cell.seq_len >= 2048 else ""
        return outcome

    machine.behaviour = compared
    lab.run(machine, lab.config(methods="square,window", seq_len="1k..4k"))
    told = {(task.cell.method, task.cell.seq_len): task.engine for task in machine.tasks if task.kind == "memory"}
    for method in ("square", "window"):
        assert [told[method, length] for length in (1024, 2048, 4096)] == ["", "", "meta"]
    assert not any(task.engine for task in machine.tasks if task.kind == "time")


def test_impls_of_a_length_are_measured_in_interleaved_rounds(lab: Any) -> None:
    machine = lab.machine()
    lab.run(machine, lab.config(methods="square,window", impls="reference,fast", seq_len="1k,2k"))
    first = [(name, process) for kind, name, length, process in machine.rounds() if kind == "time" and length == 1024]
    assert len(first) == 9
    for number in range(3):
        assert {process for _, process in first[3 * number : 3 * number + 3]} == {number}
    lengths = [length for *_, length, _ in machine.rounds()]
    assert lengths == sorted(lengths)


def test_the_order_of_measuring_follows_the_seed(lab: Any) -> None:
    orders = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        machine = lab.machine()
        axes = {"methods": "square,window", "impls": "reference,fast", "seq_len": "1k..16k"}
        lab.run(machine, lab.config(protocol={"seed": seed}, **axes), folder=folder)
        orders.append(machine.rounds())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("status", ["oom", "timeout", "killed", "error", "gate_failed"])
def test_a_first_process_that_fails_ends_the_cell_without_numbers(status: str, lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.cell.seq_len == 2048:
            gate = Gate(ok=False, message="differs") if status == "gate_failed" else None
            return Outcome(status=status, reason="planted", detail="Traceback ...", gate=gate, elapsed_s=1.0)
        return None

    machine.behaviour = behaviour
    summary = lab.run(machine, lab.config(seq_len="1k..8k"))
    row = at(summary.rows, seq_len=2048)
    assert (row.status, row.reason, row.detail, row.latency_s) == (status, "planted", "Traceback ...", None)
    assert row.flops.formula > 0
    assert row.forecast.latency_s > 0
    assert [name for name in machine.rounds() if name[2] == 2048] == [("time", "square/reference", 2048, 0)]
    longer = {at(summary.rows, seq_len=length).status for length in (4096, 8192)}
    assert longer == ({"skipped"} if status in ("oom", "timeout", "killed") else {"ok"})
    assert (status in FAILURES) == (summary.exit_code == Exit.CELLS_FAILED)


def test_a_replicate_that_fails_leaves_the_others_and_a_warning(lab: Any) -> None:
    machine = lab.machine()
    machine.behaviour = lambda task: (
        Outcome(status="oom", reason="no memory", elapsed_s=0.2) if task.kind == "time" and task.process == 1 else None
    )
    (row,) = lab.run(machine, lab.config(seq_len="1k")).rows
    assert (row.status, row.latency_s.n_processes) == ("ok", 2)
    assert "process_failed" in codes(row)


def test_a_memory_process_that_fails_is_replaced_by_the_tracer(lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.kind == "memory":
            return Outcome(status="oom", reason="no memory", elapsed_s=0.2)
        if task.kind == "trace":
            return Outcome(status="ok", memory=Memory(traced=77, counted_flops=5), elapsed_s=0.1)
        return None

    machine.behaviour = behaviour
    (row,) = lab.run(machine, lab.config(seq_len="1k")).rows
    assert row.status == "ok"
    assert (row.peak_bytes.allocated, row.peak_bytes.traced, row.flops.counted) == (None, 77, 5)
    assert {"memory_failed", "flops_disagree"} <= codes(row)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"counted_flops": 0}, "flops_zero"),
        ({"counted_flops": 7}, "flops_disagree"),
        ({"allocated": 2**30, "resident": 2**30}, "peak_formula"),
        ({"resident": 2**30}, "meters_disagree"),
        ({"parameters": 1}, "parameters_formula"),
        ({"state": 9}, "state_formula"),
        ({"uncounted": {"mine.op": 3}}, "uncounted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_contradicts_a_formula_is_a_warning_in_the_row(changes: dict[str, Any], code: str, lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.kind != "memory":
            return None
        outcome = machine.remembered(task)
        return msgspec.structs.replace(outcome, memory=msgspec.structs.replace(outcome.memory, **changes))

    machine.behaviour = behaviour
    (row,) = lab.run(machine, lab.config(seq_len="1k")).rows
    assert codes(row) == {code}


def test_replicates_with_different_outputs_are_marked(lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.kind != "time":
            return None
        outcome = machine.timed(task)
        return msgspec.structs.replace(outcome, samples=msgspec.structs.replace(outcome.samples, checksum=task.process))

    machine.behaviour = behaviour
    (row,) = lab.run(machine, lab.config(seq_len="1k")).rows
    assert codes(row) == {"checksum"}


def test_disturbed_processes_are_repeated_kept_marked_and_left_out_of_the_median(lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.kind != "time" or task.process not in (1, 2):
            return None
        outcome = machine.timed(task)
        samples = msgspec.structs.replace(outcome.samples, samples=[9.0, 9.0, 9.0], contended=True)
        return msgspec.structs.replace(outcome, samples=samples)

    machine.behaviour = behaviour
    (row,) = lab.run(machine, lab.config(seq_len="1k")).rows
    assert row.latency_s.contended == [False, True, True, False]
    assert len(row.latency_s.samples) == 4
    assert row.latency_s.median == pytest.approx(2e-8 * 1024**2)
    assert "contended" in codes(row)


def test_a_machine_that_is_never_quiet_is_retried_three_times_at_most(lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.kind != "time":
            return None
        outcome = machine.timed(task)
        return msgspec.structs.replace(outcome, samples=msgspec.structs.replace(outcome.samples, contended=True))

    machine.behaviour = behaviour
    (row,) = lab.run(machine, lab.config(seq_len="1k")).rows
    assert row.latency_s.n_processes == 3 + 3
    assert row.latency_s.contended == [True] * 6


def test_long_calls_get_fewer_processes_and_one_process_is_unstable(lab: Any) -> None:
    machine = lab.machine(lambda cell: {1024: 1.0, 2048: 3.0, 4096: 8.0}[cell.seq_len])
    rows = lab.run(machine, lab.config(seq_len="1k..4k")).rows
    assert [row.latency_s.n_processes for row in rows] == [3, 2, 1]
    assert [row.status for row in rows] == ["ok", "ok", "unstable"]
    assert rows[2].reason == "one process only"
    assert "one_process" in codes(rows[2])


def test_an_interval_wider_than_the_precision_is_unstable(lab: Any) -> None:
    machine = lab.machine()

    def behaviour(task: Task) -> Outcome | None:
        if task.kind != "time":
            return None
        machine.law = lambda cell: 1e-3 * (1 + task.process)
        return machine.timed(task)

    machine.behaviour = behaviour
    (row,) = lab.run(machine, lab.config(seq_len="1k", protocol={"precision": "2%"})).rows
    assert (row.status, row.reason) == ("unstable", "interval wider than +-2 % of the median")
    assert "precision" in codes(row)


def test_meters_that_would_take_too_long_give_way_to_the_tracer(lab: Any) -> None:
    machine = lab.machine(lambda cell: 12.0)
    config = lab.config(seq_len="1k", limits={"cell_timeout": "14s"}, protocol={"sample_cap": 1})
    machine.behaviour = lambda task: machine.timed(task, elapsed_s=13.0) if task.kind == "time" else None
    (row,) = lab.run(machine, config).rows
    assert [kind for kind, *_ in machine.rounds()] == ["time", "trace"]
    assert "memory_failed" in codes(row)


def test_the_run_ends_inside_the_budget_and_the_rest_is_skipped_with_a_forecast(lab: Any) -> None:
    machine = lab.machine(lambda cell: 2e-8 * cell.seq_len**2)
    config = lab.config(methods="square", impls="reference,fast", seq_len="1k..16k", limits={"budget": "20s"})
    summary = lab.run(machine, config)
    assert machine.time - 1000 <= 20
    assert len(summary.rows) == summary.planned == 10
    skipped = [row for row in summary.rows if row.status == "skipped"]
    assert skipped
    assert {row.seq_len for row in skipped} <= {4096, 8192, 16384}
    for row in skipped:
        assert "budget of 20.0 s is spent; forecast of" in row.reason or "cell timeout" in row.reason
        assert row.forecast.latency_s > 0.3
    assert summary.exit_code == Exit.OK


def test_the_time_that_is_left_is_never_less_than_none(lab: Any) -> None:
    class Told(Progress):
        def current(self, cell: Cell, what: str, left_s: float) -> None:
            told.append(left_s)

    told: list[float] = []
    machine = lab.machine(lambda cell: 1e-3)
    # Every child takes longer than foreseen: the last one ends in the part of the budget that is not planned with.
    machine.behaviour = lambda task: machine.timed(task, elapsed_s=5.5) if task.kind == "time" else None
    lab.run(machine, lab.config(methods="square,window", seq_len="1k", limits={"budget": "5s"}), progress=Told())
    assert 5 - 0.25 < machine.time - 1000 <= 5
    assert min(told) >= 0.0


def test_a_child_that_the_budget_cuts_off_is_no_timeout(lab: Any) -> None:
    machine = lab.machine(lambda cell: 1e-3 if cell.seq_len == 1024 else 50.0)
    summary = lab.run(machine, lab.config(seq_len="1k,2k", limits={"budget": "15s"}))
    row = at(summary.rows, seq_len=2048)
    assert (row.status, row.reason.partition(";")[0]) == ("skipped", "the budget of 15.0 s is spent")
    assert machine.time - 1000 <= 15


def test_with_time_to_spare_a_short_budget_costs_processes_before_it_costs_cells(lab: Any) -> None:
    machine = lab.machine()
    summary = lab.run(machine, lab.config(seq_len="1k..8k", limits={"budget": "14s"}))
    assert {row.status for row in summary.rows} <= {"ok", "unstable"}
    assert min(row.latency_s.n_processes for row in summary.rows) < 3


def test_how_many_processes_a_budget_allows_is_learnt_from_the_first_ones(lab: Any) -> None:
    machine = lab.machine(lambda cell: 1e-4)
    machine.start_s = machine.gate_s = machine.meters_s = 0.05
    axes = {"methods": "square,window", "impls": "all", "seq_len": "1k..8k"}
    config = lab.config(protocol={"sample_budget": 0.01}, limits={"budget": "24s"}, **axes)
    rows = [row for row in lab.run(machine, config).rows if row.latency_s is not None]
    assert len(rows) == 12
    assert min(row.latency_s.n_processes for row in rows) == 2
    assert machine.time - 1000 <= config.budget_s


def test_where_time_is_scarce_a_slow_impl_has_two_processes_or_none(lab: Any) -> None:
    machine = lab.machine(lambda cell: 1e-4 if cell.impl == "fast" else 0.3)
    machine.start_s = machine.gate_s = machine.meters_s = 0.5
    axes = {"methods": "square", "impls": "all", "seq_len": "1k..8k"}
    config = lab.config(protocol={"sample_budget": 0.01}, limits={"budget": "25s"}, **axes)
    rows = lab.run(machine, config).rows
    known = {impl: [row for row in rows if row.impl == impl and row.latency_s] for impl in ("reference", "fast")}
    assert [row.seq_len for row in known["fast"]] == [1024, 2048, 4096, 8192]
    assert min(row.latency_s.n_processes for row in known["fast"]) >= 2
    assert {row.latency_s.n_processes for row in known["reference"]} == {2}
    assert 0 < len(known["reference"]) < 4
    assert machine.time - 1000 <= config.budget_s


def test_what_was_passed_over_is_measured_when_its_time_was_not_needed(lab: Any) -> None:
    machine = lab.machine(lambda cell: 1e-4 * (1 + (cell.impl == "reference")))
    machine.start_s = machine.gate_s = machine.meters_s = 0.01  # far below what is foreseen before any has ended
    axes = {"methods": "square,window", "impls": "all", "seq_len": "1k..8k"}
    config = lab.config(protocol={"sample_budget": 0.01}, limits={"budget": "8s"}, **axes)
    rows = [row for row in lab.run(machine, config).rows if row.status != "unsupported"]
    assert all(row.latency_s is not None for row in rows)


def test_a_cell_without_any_forecast_runs_and_teaches_the_next_length(lab: Any) -> None:
    machine = lab.machine()
    summary = lab.run(machine, lab.config(methods="plain", seq_len="1k..4k"))
    assert {row.status for row in summary.rows} == {"ok"}
    assert [row.forecast.basis for row in summary.rows][1:] == ["power law from 1k", "power law from 2k"]


def test_without_the_gate_every_row_says_so(lab: Any) -> None:
    machine = lab.machine()
    (row,) = lab.run(machine, lab.config(seq_len="1k", protocol={"gate": False})).rows
    assert not any(task.gate for task in machine.tasks)
    assert "no_gate" in codes(row)
