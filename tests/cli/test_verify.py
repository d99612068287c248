"""``ctxbench verify``: which cells, in which folder, with which exit code. The executors need no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.rows import Gate
from ctxbench.run import session
from ctxbench.run.store import read_rows
from ctxbench.run.tasks import Memory, Outcome, Samples, Task

SMALL = ("--methods", "dense", "--impls", "blocked", "--seq", "64..512", "--device", "cpu", "--no-report")


class Instant:
    """Ends every task at once, in ``seconds`` with one per cent from process to process."""

    def __init__(self) -> None:
        self.seconds, self.status = 0.01, "ok"
        self.turn = itertools.cycle((0.99, 1.0, 1.01))

    def submit(self, task: Task, timeout_s: float, memory_limit: int | None) -> Outcome:
        if task.kind == "time" and self.status == "ok":
            call = self.seconds * next(self.turn)
            samples = Samples(samples=[call] * 3, cpu=[call] * 3, stop="budget")
            return Outcome(status="ok", samples=samples, gate=Gate(ok=True), elapsed_s=0.1)
        if task.kind == "time":
            return Outcome(status=self.status, reason="planted")
        return Outcome(status="ok", memory=Memory(allocated=2**20, resident=2**20))

    def close(self) -> None:
        pass


@pytest.fixture
def instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctxbench: Callable[..., Any]) -> Instant:
    executor = Instant()
    monkeypatch.setattr(session, "servers", lambda threads: lambda heap, device: executor)
    monkeypatch.chdir(tmp_path)
    assert ctxbench("run", *SMALL, "--out", "runs/a").code == 0
    return executor


def test_cells_are_repeated_in_a_folder_of_their_own(instant: Instant, ctxbench: Callable[..., Any]) -> None:
    before = Path("runs/a/rows.jsonl").read_bytes()
    result = ctxbench("verify", "runs/a", "-k", "2", "--seed", "7")
    (folder,) = Path("runs").glob("*-verify-*")
    assert result.code == 0
    for part in (
        "2 of 2 cells are where a expects them  (--seed 7)",
        "dense / blocked",
        "same",
        f"{folder}/rows.jsonl",
    ):
        assert part in result.out
    assert len(read_rows(folder)) == 2
    assert Path("runs/a/rows.jsonl").read_bytes() == before
    assert "2/2" in result.err


def test_slower_cells_exit_1_and_json_says_all(instant: Instant, ctxbench: Callable[..., Any]) -> None:
    instant.seconds = 0.02
    result = ctxbench("verify", "runs/a", "--out", "again", "--json", "-q")
    found = result.json
    assert (result.code, found["exit_code"], found["judged"], found["inside"]) == (1, 1, 4, 0)
    assert found["again"] == "again"
    assert all(cell["now_s"] > cell["high"] for cell in found["cells"])


def test_a_cell_that_fails_now_exits_1(instant: Instant, ctxbench: Callable[..., Any]) -> None:
    instant.status = "error"
    result = ctxbench("verify", "runs/a", "-k", "1", "--seed", "0")
    assert (result.code, "planted" in result.out, "0 of 0 cells" in result.out) == (1, True, True)


def test_bad_input_is_a_usage_error(instant: Instant, ctxbench: Callable[..., Any]) -> None:
    assert ctxbench("verify", "nowhere").code == 2
    assert ctxbench("verify", "runs/a", "-k", "0").code == 2
    assert ctxbench("verify", "runs/a", "--budget", "soon").code == 2
    taken = ctxbench("verify", "runs/a", "--out", "runs/a")
    assert (taken.code, "holds a run already" in taken.err) == (2, True)
    Path("runs/a/run.json").write_text('{"schema": "ctxbench.run/1"}')
    bare = ctxbench("verify", "runs/a")
    assert (bare.code, "no configuration that this version can repeat" in bare.err) == (2, True)


def test_a_method_that_is_gone_is_named(instant: Instant, ctxbench: Callable[..., Any]) -> None:
    rows = Path("runs/a/rows.jsonl")
    rows.write_text(rows.read_text().replace('"method":"dense"', '"method":"gone"'))
    result = ctxbench("verify", "runs/a")
    assert (result.code, "measures gone, which is not installed" in result.err) == (2, True)
