"""kill -9 at random moments, of the run or of its children: nothing finished is lost, nothing is there twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ctxbench import suite as suites
from ctxbench.config import resolve
from ctxbench.registry import discover
from ctxbench.rows import Gate, Row
from ctxbench.run import session
from ctxbench.run.store import JOURNAL, ROWS, read_rows
from ctxbench.run.tasks import Memory, Outcome, Samples, Task
from ctxbench.suite import Axes, Limits, Protocol, Suite

KILLS = 44  # with the six real ones below: fifty


class Brisk:
    """Children of a millisecond, so that a kill can fall anywhere: into a child, a row, the journal, the header."""

    def submit(self, task: Task, timeout_s: float, memory_limit: int | None) -> Outcome:
        time.sleep(0.001)
        if task.kind == "time":
            samples = Samples(samples=[1e-3, 1e-3], cpu=[1e-3] * 2)
            return Outcome(status="ok", samples=samples, gate=Gate(ok=True), elapsed_s=0.001)
        return Outcome(status="ok", memory=Memory(allocated=1, resident=1))

    def close(self) -> None:
        pass


def whole_lines(path: Path) -> list[bytes]:
    """Lines that are completely written."""
    content = path.read_bytes() if path.exists() else b""
    return content.splitlines(keepends=True)[: content.count(b"\n")]


def test_a_killed_run_keeps_every_finished_row_and_child(tmp_path: Path) -> None:
    registry = discover()
    axes = Axes(
        methods="dense",
        impls="reference,blocked",
        seq_len="16..64+16",
        mode="forward,train",
        batch_size="1,2,3",
        device="cpu",
    )
    flags = Suite(axes=axes, protocol=Protocol(processes=2), limits=Limits(memory_limit="8GiB"))
    config = resolve("scaling", suites.layers("scaling", flags, tmp_path)[1], registry)
    folder, chance = tmp_path / "run", random.Random(7)
    total = 4 * 2 * 3 * 2
    rows: list[bytes] = []
    journal: list[bytes] = []
    killed = 0
    while killed < KILLS:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                session.execute(config, registry, folder, "ctxbench run", make_executor=lambda heap, device: Brisk())
            os._exit(0)
        time.sleep(chance.uniform(0, 0.12))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        now = whole_lines(folder / ROWS)
        assert set(now) >= set(rows)
        assert whole_lines(folder / JOURNAL)[: len(journal)] == journal
        rows, journal = now, whole_lines(folder / JOURNAL)
        if len(rows) == total:  # finished: further kills meet a fresh run
            (folder / ROWS).unlink()
            (folder / JOURNAL).unlink()
            rows, journal = [], []
    summary, plan = session.execute(config, registry, folder, "", make_executor=lambda heap, device: Brisk())
    assert summary.counts() == {"ok": total}
    lines = whole_lines(folder / ROWS)
    assert set(lines) >= set(rows)
    assert [row.cell for row in read_rows(folder)] == [planned.cell.key for planned in plan.cells]
    assert len(lines) == total


@pytest.mark.slow
def test_real_runs_survive_kills_of_the_run_its_servers_and_its_children(tmp_path: Path) -> None:
    # Cells that differ in the batch are series of their own: a killed one implies nothing about the others.
    flags = "--methods dense --impls blocked --seq 8 --batch 1..12+1 --d-model 16 --heads 2 --processes 1 --device cpu"
    flags += " --no-report --out run --rerun failed"
    command = [sys.executable, "-c", "from ctxbench.cli import main; main()", "run", *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chance = random.Random(3)
    victims = ["child", "run", "child", "server", "child", "run"]
    measured: dict[str, Row] = {}
    while victims:
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as run:
            while run.poll() is None and victims:
                time.sleep(chance.uniform(0.02, 0.2))
                if _kill(run, victims[0]):
                    victims.pop(0)
        now = {row.cell: row for row in read_rows(tmp_path / "run")}
        assert {key: now.get(key) for key in measured} == measured
        measured = {key: row for key, row in now.items() if row.measured}
        assert len(measured) < 12 or not victims, "the run ended before all kills had been made"
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    rows = {row.cell: row for row in read_rows(tmp_path / "run")}
    assert {key: rows[key] for key in measured} == measured
    assert sorted(row.batch_size for row in rows.values() if row.measured) == list(range(1, 13))
    assert len(whole_lines(tmp_path / "run" / ROWS)) == 12


def _kill(run: subprocess.Popen[Any], victim: str) -> bool:
    """Kill the run, one of its servers, or a measuring child; False when there is none at this moment."""
    try:
        parent = psutil.Process(run.pid)
        servers = parent.children()
        children = [child for server in servers for child in server.children()]
        target = {"run": [parent], "server": servers, "child": children}[victim]
        if not children or not target:  # nothing is being measured yet
            return False
        target[0].send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True
