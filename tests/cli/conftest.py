"""A machine on which every child ends at once: runs of the command line that need no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ctxbench.rows import Gate
from ctxbench.run import session
from ctxbench.run.tasks import Calibration, Memory, Outcome, Samples, Task


class Instant:
    """Ends every task at once; ``fate`` overrides outcomes or raises."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.fate: Callable[[Task], Outcome | None] = lambda task: None

    def submit(self, task: Task, timeout_s: float, memory_limit: int | None) -> Outcome:
        self.tasks.append(task)
        chosen = self.fate(task)
        if chosen is not None:
            return chosen
        if task.kind == "time":
            samples = Samples(samples=[0.01, 0.01, 0.01], cpu=[0.01] * 3, stop="budget")
            return Outcome(status="ok", samples=samples, gate=Gate(ok=True), elapsed_s=0.1)
        if task.kind == "calibrate":
            found = Calibration(matmul_flops_per_s={"fp32": 1e12}, copy_bytes_per_s=1e11, threads=1)
            return Outcome(status="ok", calibration=found)
        if task.kind == "environment":
            return Outcome(status="ok", environment={"torch": "planted"})
        return Outcome(status="ok", memory=Memory(allocated=2**20, resident=2**20))

    def close(self) -> None:
        pass

    def measured(self) -> list[int]:
        """Lengths of the cells that children worked on."""
        return [task.cell.seq_len for task in self.tasks if task.kind in ("time", "memory") and task.cell is not None]


@pytest.fixture
def instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instant:
    executor = Instant()
    monkeypatch.setattr(session, "servers", lambda threads: lambda heap, device: executor)
    monkeypatch.chdir(tmp_path)
    return executor
