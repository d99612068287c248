"""A run that was interrupted, or failed here and there, and is started again: nothing is lost, nothing done twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxbench.errors import Exit
from ctxbench.run.store import ROWS, read_rows
from ctxbench.run.tasks import Outcome, Task


def interrupt_at(machine: Any, number: int) -> None:
    seen = Counter()

    def behaviour(task: Task) -> Outcome | None:
        seen["children"] += 1
        if seen["children"] == number:
            raise KeyboardInterrupt
        return None

    machine.behaviour = behaviour


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 40), max_size=4), torn=st.integers(0, 200))
def test_interrupted_anywhere_and_continued_each_child_runs_once_and_each_cell_has_one_row(
    lab: Any, tmp_path_factory: pytest.TempPathFactory, cuts: list[int], torn: int
) -> None:
    lab.folder = tmp_path_factory.mktemp("interrupted")
    config = lab.config(methods="square,window", impls="all", seq_len="1k..4k", mode="forward,decode")
    done: list[Any] = []
    for cut in cuts:
        machine = lab.machine()
        interrupt_at(machine, cut)
        summary = lab.run(machine, config)
        done += machine.rounds()[:-1] if summary.interrupted else machine.rounds()
        assert summary.exit_code == (Exit.INTERRUPTED if summary.interrupted else Exit.OK)
        with (lab.folder / "run" / ROWS).open("ab") as file:  # and a crash in the middle of a row
            file.write(b'{"schema": "ctxbench.row/1", "cell": "' + b"x" * torn)
    machine = lab.machine()
    summary = lab.run(machine, config)
    done += machine.rounds()
    assert len(done) == len(set(done))
    plan = lab.plan(config)
    assert [row.cell for row in read_rows(lab.folder / "run")] == [planned.cell.key for planned in plan.cells]
    assert (lab.folder / "run" / ROWS).read_bytes().count(b"\n") == len(plan.cells)
    assert summary.counts() == {"ok": 9, "unsupported": 15}


def test_a_finished_run_is_not_measured_again(lab: Any) -> None:
    lab.run(lab.machine(), lab.config(methods="all", impls="all"))
    before = (lab.folder / "run" / ROWS).read_bytes()
    machine = lab.machine()
    lab.run(machine, lab.config(methods="all", impls="all"))
    assert machine.tasks == []
    assert (lab.folder / "run" / ROWS).read_bytes() == before


def test_what_the_budget_left_out_runs_in_the_next_session(lab: Any) -> None:
    first = lab.run(lab.machine(lambda cell: 1.0), lab.config(seq_len="1k..8k", limits={"budget": "10s"}))
    assert first.counts().get("skipped")
    second = lab.run(lab.machine(lambda cell: 1.0), lab.config(seq_len="1k..8k", limits={"budget": "10m"}))
    assert "skipped" not in second.counts()
    assert len(second.rows) == 4


@pytest.mark.parametrize(("rerun", "again"), [("", 0), ("failed", 1), ("all", 3)])
def test_rerun_measures_failed_cells_or_all_again(rerun: str, again: int, lab: Any) -> None:
    machine = lab.machine()
    machine.behaviour = lambda task: (
        Outcome(status="error", reason="planted", elapsed_s=0.1) if task.cell.seq_len == 2048 else None
    )
    config = lab.config(seq_len="1k..4k")
    assert lab.run(machine, config).counts() == {"ok": 2, "error": 1}
    machine = lab.machine()
    summary = lab.run(machine, config, rerun=rerun)
    assert len({task.cell.key for task in machine.tasks}) == again
    assert summary.counts() == ({"ok": 3} if rerun else {"ok": 2, "error": 1})
    assert (lab.folder / "run" / ROWS).read_bytes().count(b"\n") == 3


_STATUSES = ("ok", "oom", "timeout", "killed", "error", "gate_failed")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fates=st.dictionaries(st.integers(1, 60), st.sampled_from(_STATUSES)), budget=st.integers(1, 60))
def test_whatever_happens_every_cell_has_exactly_one_row(
    lab: Any, tmp_path_factory: pytest.TempPathFactory, fates: dict[int, str], budget: int
) -> None:
    lab.folder = tmp_path_factory.mktemp("fates")
    machine = lab.machine()
    count = iter(range(1, 1000))

    def behaviour(task: Task) -> Outcome | None:
        status = fates.get(next(count), "ok")
        return None if status == "ok" else Outcome(status=status, reason="planted", elapsed_s=0.5)

    machine.behaviour = behaviour
    axes = {"methods": "all", "impls": "all", "seq_len": "1k..8k", "mode": "forward,stream"}
    config = lab.config(limits={"budget": budget}, **axes)
    summary = lab.run(machine, config)
    keys = [planned.cell.key for planned in lab.plan(config).cells]
    assert [row.cell for row in summary.rows] == keys
    assert [row.cell for row in read_rows(lab.folder / "run")] == keys
    assert all(row.reason for row in summary.rows if row.status != "ok")
    assert all(row.latency_s is None for row in summary.rows if row.status not in ("ok", "unstable"))
    assert machine.time - 1000 <= budget


def test_executors_are_closed_however_the_run_ends(lab: Any) -> None:
    machine = lab.machine()
    interrupt_at(machine, 2)
    lab.run(machine, lab.config())
    assert machine.closed == 2

    def broken(_: Task) -> Outcome | None:
        raise ValueError("a defect of the harness")

    machine = lab.machine()
    machine.behaviour = broken
    with pytest.raises(ValueError, match="a defect"):
        lab.run(machine, lab.config(), folder="other")
    assert machine.closed == 1
