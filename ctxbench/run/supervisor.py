"""Takes a plan to a finished run folder: cheapest first, side by side, inside the budget, one row a cell.

Every child process is one round of one cell. The first round of a cell passes the gate and is followed by its memory
process; later rounds are replicates. Rounds of one group of cells are interleaved in random order, so that a machine
that becomes slower becomes slower for all of them.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from ctxbench.config import Config
from ctxbench.cost.roofline import Ceilings
from ctxbench.errors import Exit
from ctxbench.pace import Pace, groups, processes_for
from ctxbench.plan import Forecaster, Plan, Planned
from ctxbench.rows import FAILURES, Row
from ctxbench.run import assemble, tasks
from ctxbench.run.progress import Progress
from ctxbench.run.store import Entry, Store, now
from ctxbench.run.tasks import Outcome, Task
from ctxbench.units import format_seconds

RETRIES = 3  # further processes for a cell that ran beside other work
# No child is planned into the end of the budget, so that one which takes longer than forecast still ends inside it;
# half of that end is for the last rows.
GRACE_S, GRACE_SHARE, LAST_ROWS = 2.5, 0.05, 0.5
LEAST_CHILD_S = 0.3  # with less time left, no child is started
SET_UP_S = 60.0  # limit of calibration and of reading the environment
RERUN = ("failed", "all")


class Executor(Protocol):
    """Runs one task in one child process; ``ctxbench.run.client.Server`` is the real one."""

    def submit(self, task: Task, timeout_s: float, memory_limit: int | None) -> Outcome: ...

    def close(self) -> None: ...


MakeExecutor = Callable[[str, str], Executor]  # heap ("timing" or "memory") and device


@dataclass
class Summary:
    """What a session of a run came to; ``rows`` are those of the whole run, in the order of the plan."""

    rows: list[Row]
    planned: int
    interrupted: bool = False
    elapsed_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rows by status."""
        return dict(Counter(row.status for row in self.rows))

    def warnings(self) -> dict[str, int]:
        """Rows by kind of warning, most frequent first."""
        return dict(Counter(code for row in self.rows for code in sorted(set(assemble.codes(row)))).most_common())

    @property
    def exit_code(self) -> Exit:
        """130 when interrupted, 1 when a cell failed, else 0: a skip is not a failure."""
        if self.interrupted:
            return Exit.INTERRUPTED
        return Exit.CELLS_FAILED if any(row.status in FAILURES for row in self.rows) else Exit.OK


@dataclass
class Work:
    """A cell that is being measured."""

    planned: Planned
    timed: list[Outcome] = field(default_factory=list)
    memory: Outcome | None = None
    started_at: str = ""
    retries: int = 0

    @property
    def failed(self) -> bool:
        """Whether the first timing process gave no number, which ends the cell."""
        return bool(self.timed) and (self.timed[0].samples is None or not self.timed[0].samples.samples)

    @property
    def call_s(self) -> float | None:
        """Seconds a call: measured where a process has finished, else the forecast."""
        processes = [outcome.samples.samples for outcome in self.timed if outcome.samples is not None]
        medians = [statistics.median(samples) for samples in processes if samples]
        return statistics.median(medians) if medians else self.planned.forecast.latency_s

    @property
    def contended(self) -> bool:
        """Whether fewer than two processes ran undisturbed."""
        quiet = [outcome for outcome in self.timed if outcome.samples and not outcome.samples.contended]
        return len(quiet) < min(2, len(self.timed))


class Supervisor:
    """One session on one run folder."""

    def __init__(
        self, plan: Plan, store: Store, ceilings: dict[str, Ceilings], make_executor: MakeExecutor,
        progress: Progress | None = None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.plan, self.store, self.ceilings = plan, store, ceilings
        self.config: Config = plan.config
        self.progress = progress or Progress()
        self.clock = clock
        self.make_executor = make_executor
        self.executors: dict[tuple[str, str], Executor] = {}
        self.pace = Pace(plan.config, plan.cells)
        self.forecaster = Forecaster(plan, ceilings)
        self.engines: dict[Any, str] = {}  # the tracer's, by series, where a process has compared both
        self.random = random.Random(plan.config.protocol.seed)
        self.started = self.deadline = self.grace_s = 0.0
        self.by_key = {planned.cell.key: planned for planned in plan.cells}

    def run(self, rerun: str = "", on_start: Callable[[Supervisor], None] | None = None) -> Summary:
        """Measure what is left of the plan; ``rerun`` is ``failed`` or ``all`` for cells that already have a row.

        ``on_start`` is called once the budget's clock runs, and may calibrate. Ctrl-C keeps every finished row, and
        every finished child for the next start.
        """
        self.started = self.clock()
        self.grace_s = min(GRACE_S, GRACE_SHARE * self.config.budget_s)
        self.deadline = self.started + self.config.budget_s - self.grace_s
        self._settle(rerun)
        interrupted = False
        try:
            self.progress.start(len(self.plan.cells), len(self._finished()))
            self._write_unmeasured("unsupported", "error")
            if self._remaining():
                if on_start is not None:
                    on_start(self)
                self._measure()
            self._write_unmeasured("planned", "skipped")
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self.progress.stop()
            for executor in self.executors.values():
                executor.close()
        self.store.compact(self.by_key)
        rows = list(self.store.rows.values())
        return Summary(rows, len(self.plan.cells), interrupted, self.clock() - self.started, list(self.store.notes))

    def executor(self, heap: str, device: str) -> Executor:
        """The fork server of a heap and a device, started when first asked for."""
        if (heap, device) not in self.executors:
            self.executors[heap, device] = self.make_executor(heap, device)
        return self.executors[heap, device]

    def left_s(self) -> float:
        """Seconds of the budget that are left to plan with."""
        return self.deadline - self.clock()

    def use_ceilings(self, ceilings: Ceilings) -> None:
        """Take freshly calibrated ceilings for all forecasts from here on."""
        self.ceilings[ceilings.device] = ceilings

    def _settle(self, rerun: str) -> None:
        """Decide which cells earlier sessions have settled; a skip is never settled, and reruns start over."""
        again = {
            key for key, row in self.store.rows.items()
            if rerun == "all" or (rerun == "failed" and row.status in FAILURES)
        }  # fmt: skip
        if again:
            self.store.forget(again)
        self.open = {key for key in self.by_key if key in again or key not in self.store.rows}
        self.open |= {key for key, row in self.store.rows.items() if row.status == "skipped" and key in self.by_key}
        for key, row in self.store.rows.items():
            if key in self.by_key and key not in self.open:
                self.forecaster.observe(row)

    def _finished(self) -> list[str]:
        return [key for key in self.by_key if key not in self.open]

    def _remaining(self) -> list[Planned]:
        """Cells that are still to be measured, judged by all that is known now."""
        waiting = [planned for key, planned in self.by_key.items() if key in self.open]
        self.forecaster.refresh(waiting)
        return [planned for planned in waiting if planned.status == "planned"]

    def _measure(self) -> None:
        passed_over: set[str] = set()
        while self.left_s() > LEAST_CHILD_S:
            affordable = [planned for planned in self._remaining() if not self._too_dear(planned)]
            waiting = self._waiting(affordable, passed_over)
            if not waiting:
                return
            before = len(self.open)
            passed_over |= self._measure_group(groups(waiting, self.config, self.plan.cells)[0], waiting)
            if len(self.open) < before:  # more is known of what others need: judge again
                passed_over = set()

    def _too_dear(self, planned: Planned) -> bool:
        """Whether a first process would be cut off by the budget; a forecast that is only a roofline may be wrong."""
        expected = planned.forecast
        trusted = expected.low if expected.basis.startswith("roofline") else expected.latency_s
        return trusted is not None and trusted > self.left_s()

    def _measure_group(self, group: list[Planned], remaining: list[Planned]) -> set[str]:
        """Measure what the budget allows of a group; the keys of the cells that are not worth beginning now."""
        processes, fastest = self.pace.everywhere(remaining, self.left_s()), self.pace.fastest()
        works = [self._resumed(planned) for planned in group]
        self.random.shuffle(works)
        live: list[Work] = []
        passed_over: set[str] = set()
        for work in works:
            if not processes and not work.timed:
                begun = {other.planned.cell.key: other.call_s for other in live}
                waiting = self._waiting(remaining, passed_over | begun.keys())
                if not self.pace.worth_beginning(work.planned, waiting, self.left_s(), begun.values(), fastest):
                    passed_over.add(work.planned.cell.key)
                    continue
            self._show(work, "first process", remaining, processes)
            if not self._first_round(work):
                break  # the budget is spent
            if work.failed or processes_for(work.call_s, self.config.protocol.processes) <= len(work.timed):
                self._finish(work)
            else:
                live.append(work)
        begun = {work.planned.cell.key: work.call_s for work in live}
        waiting = self._waiting(remaining, passed_over | begun.keys())
        shares = self.pace.shares(begun, waiting, self.left_s(), self.pace.fastest(begun))
        processes = min(shares.values(), default=1)
        for round_number in range(2, max(shares.values(), default=1) + 1):
            self.random.shuffle(live)
            for work in live:
                if len(work.timed) < min(round_number, processes_for(work.call_s, shares[work.planned.cell.key])):
                    self._show(work, f"process {round_number}", remaining, processes)
                    self._replicate(work)
        self._retry_contended(live, remaining, processes)
        for work in live:
            self._finish(work)
        return passed_over

    def _waiting(self, cells: list[Planned], without: Collection[str] = ()) -> list[Planned]:
        """Those of the cells that have no row yet."""
        return [planned for planned in cells if planned.cell.key in self.open and planned.cell.key not in without]

    def _resumed(self, planned: Planned) -> Work:
        """The cell with the children that an earlier session has finished."""
        work = Work(planned, started_at=now())
        entries = self.store.outcomes.get(planned.cell.key, [])
        for entry in sorted(entries, key=lambda entry: entry.process):
            if entry.kind == "memory":
                work.memory = entry.outcome
            elif entry.kind == "time" and entry.process == len(work.timed):
                work.timed.append(entry.outcome)
        return work

    def _first_round(self, work: Work) -> bool:
        """The gated process and the memory process; False when the budget leaves no time for the gated one."""
        if not work.timed:
            outcome = self._submit(work, "time", process=0)
            if outcome is None:
                return False
            work.timed.append(outcome)
        if work.failed:
            return True
        predicted = self.pace.memory_child(work.call_s)
        if work.memory is None and predicted > min(self.config.cell_timeout_s, self.left_s()):
            work.memory = Outcome(status="skipped", reason=f"the meters would take {format_seconds(predicted)}")
        if work.memory is None:
            work.memory = self._submit(work, "memory")
        if work.memory is not None and work.memory.memory is None:
            work.memory = self._traced(work, work.memory)
        return True

    def _traced(self, work: Work, cause: Outcome) -> Outcome:
        """Where the meters cannot run, fake tensors still tell FLOPs and peak; the row says why they stand in."""
        traced = self._submit(work, "trace")
        if traced is None or traced.memory is None:
            return cause
        return msgspec.structs.replace(
            cause, memory=traced.memory, elapsed_s=cause.elapsed_s + traced.elapsed_s, detail=cause.detail
        )

    def _replicate(self, work: Work) -> None:
        predicted = self.pace.time_child(work.call_s)
        if predicted <= min(self.left_s(), self.config.cell_timeout_s):
            outcome = self._submit(work, "time", process=len(work.timed))
            if outcome is not None:
                work.timed.append(outcome)

    def _retry_contended(self, live: list[Work], remaining: list[Planned], processes: int) -> None:
        """Measure disturbed cells again, later, as long as everything else still fits into the budget."""
        group = {work.planned.cell.key for work in live}
        rest = [planned for planned in remaining if planned.cell.key not in group]
        for attempt in range(1, RETRIES + 1):
            for work in live:
                spare = self.left_s() - self.pace.total(rest, processes)
                if work.contended and self.pace.time_child(work.call_s) <= spare:
                    self._show(work, f"retry {attempt}", rest, processes)
                    self._replicate(work)

    def _submit(self, work: Work, kind: str, process: int = 0) -> Outcome | None:
        """Run one child; None, and nothing kept, when the budget rather than the cell's own limit ended it."""
        planned, left = work.planned, self.left_s() + (1 - LAST_ROWS) * self.grace_s
        if self.left_s() < LEAST_CHILD_S:
            return None
        cell, gated = planned.cell, kind == "time" and process == 0 and self.config.protocol.gate
        task = Task(
            kind=kind, cell=cell, origin=planned.origin, protocol=protocol_of(self.config), gate=gated,
            passed=list(self.pace.passed.get(planned.series, [])) if gated else [],
            engine="" if kind == "time" else self.engines.get(planned.series, ""), process=process,
            expected_s=work.call_s,
        )  # fmt: skip
        executor = self.executor("timing" if kind == "time" else "memory", cell.device)
        timeout = min(self.config.cell_timeout_s, left)
        outcome = executor.submit(task, timeout, self.config.memory_limit.get(cell.device))
        if outcome.status == "timeout" and left < self.config.cell_timeout_s:
            return None
        self.store.append_outcome(Entry(cell=cell.key, kind=kind, process=process, outcome=outcome))
        if outcome.gate is not None and outcome.gate.ok and not outcome.gate.stands_for:
            self.pace.passed.setdefault(planned.series, []).append(outcome.gate)
        if kind == "time" and outcome.samples is not None:
            calls = sum(outcome.samples.samples) + sum(outcome.samples.warmup)
            computed = outcome.gate is not None and not outcome.gate.stands_for
            self.pace.learn("gate" if computed else "time", outcome.elapsed_s, calls)
        elif outcome.memory is not None and outcome.memory.engine:
            self.engines[planned.series] = outcome.memory.engine
        if kind == "memory" and outcome.memory is not None:
            self.pace.learn("memory", outcome.elapsed_s, call_s=work.call_s)
        return outcome

    def _finish(self, work: Work) -> None:
        planned, protocol = work.planned, self.config.protocol
        row = assemble.measured_row(
            planned, work.timed, work.memory, protocol.precision, protocol.gate, self.ceilings[planned.cell.device],
            work.started_at,
        )  # fmt: skip
        self._keep(row)

    def _write_unmeasured(self, *statuses: str) -> None:
        """A row for every cell without a number: unsupported, skipped by forecast, or out of budget."""
        self._remaining()
        for key in [key for key in self.by_key if key in self.open]:
            planned = self.by_key[key]
            if planned.status not in statuses:
                continue
            status, reason = planned.status, planned.reason
            if status == "planned":
                status, reason = "skipped", f"the budget of {format_seconds(self.config.budget_s)} is spent"
                if planned.forecast.latency_s is not None:
                    reason += f"; forecast of {format_seconds(planned.forecast.latency_s)} a call"
            self._keep(assemble.unmeasured_row(planned, status, reason, started_at=now()))

    def _keep(self, row: Row) -> None:
        self.open.discard(row.cell)
        if _without_time(self.store.rows.get(row.cell)) != _without_time(row):
            self.store.append_row(row)
        self.forecaster.observe(row)
        self.progress.finished(row)

    def _show(self, work: Work, what: str, remaining: list[Planned], processes: int) -> None:
        waiting = self._waiting(remaining)
        left = max(self.left_s(), 0.0)
        self.progress.current(work.planned.cell, what, min(self.pace.total(waiting, processes), left))


def protocol_of(config: Config) -> tasks.Protocol:
    """The protocol in the words of a task."""
    protocol = config.protocol
    return tasks.Protocol(
        processes=protocol.processes, precision=protocol.precision, min_samples=protocol.min_samples,
        sample_budget_s=protocol.sample_budget, sample_cap_s=protocol.sample_cap, gate=protocol.gate,
        seed=protocol.seed,
    )  # fmt: skip


def ceilings_of(calibration: tasks.Calibration, threads: int) -> Ceilings:
    """A finished calibration as the forecasts use it."""
    return Ceilings(
        flops_per_s=calibration.matmul_flops_per_s, bytes_per_s=calibration.copy_bytes_per_s, calibrated=True,
        device=calibration.device, threads=threads, measured_at=calibration.measured_at,
    )  # fmt: skip


def _without_time(row: Row | None) -> Any:
    return None if row is None else msgspec.structs.replace(row, started_at="")
