"""How long cells take to measure, in which order they are taken, and how many processes the budget allows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ctxbench.config import Config
from ctxbench.plan import Plan, Planned

CHILD_S = {"cpu": 0.6, "cuda": 4.0}  # start a child, import the method, build the module
GATE_S = 0.4
TRACE_S = 0.3
MEMORY_CALLS, ONE_MEMORY_CALL_S = 2, 2.0  # one call a meter; above this many seconds both meters share one
LEARNING_RATE = 0.2
LONG_CALL_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # cells are taken class by class, by the length of a call
LEAD = 3  # classes by which a method's fastest sound impl goes ahead of its other ones
REPLICATE_S = (2.0, 5.0)  # a call above the first is worth two processes, above the second one
SHORT = 1  # the last class of cells that may get a second process when time is short
SHORT_SHARE = 0.85  # of the time left that short cells may plan with; forecasts are sometimes low


@dataclass
class Pace:
    """Predicted wall seconds of child processes; learns their fixed cost from the ones that have ended."""

    config: Config
    child_s: float = 0.0
    gate_s: float = GATE_S

    def __post_init__(self) -> None:
        self.child_s = self.child_s or max(CHILD_S[device.partition(":")[0]] for device in self.config.device)

    def time_child(self, latency_s: float | None, gate: bool = False) -> float:
        """One timing process of a cell whose call takes this long."""
        latency, protocol = latency_s or 0.0, self.config.protocol
        checking = self.gate_s if gate and protocol.gate else 0.0
        least = _least_samples(latency, protocol.min_samples) * latency
        sampling = min(max(least, protocol.sample_budget), max(protocol.sample_cap, latency))
        return self.child_s + checking + _warm_up(latency) + sampling

    def memory_child(self, latency_s: float | None) -> float:
        """The memory process of a cell whose call takes this long."""
        latency = latency_s or 0.0
        return self.child_s + TRACE_S + latency * (MEMORY_CALLS if latency <= ONE_MEMORY_CALL_S else 1.2)

    def cell(self, planned: Planned, processes: int | None = None) -> float:
        """A whole cell with at most this many timing processes."""
        latency = planned.forecast.latency_s
        count = processes_for(latency, processes or self.config.protocol.processes)
        return self.time_child(latency, gate=True) + self.memory_child(latency) + (count - 1) * self.time_child(latency)

    def total(self, cells: Iterable[Planned], processes: int | None = None) -> float:
        """All of these cells."""
        return sum(self.cell(planned, processes) for planned in cells)

    def learn(self, elapsed_s: float, calls_s: float, gated: bool) -> None:
        """Correct the fixed costs by a timing process that took ``elapsed_s``, of which ``calls_s`` inside calls."""
        fixed = max(elapsed_s - calls_s, 0.0)
        if gated and self.config.protocol.gate:
            self.gate_s += LEARNING_RATE * (max(fixed - self.child_s, 0.0) - self.gate_s)
        else:
            self.child_s += LEARNING_RATE * (fixed - self.child_s)

    def affordable(self, group: list[Planned], remaining: list[Planned], left_s: float) -> int:
        """Timing processes a cell of ``group`` gets, so that all of ``remaining`` fits into the seconds left.

        Where even one process each does not fit, the long cells at the end will not run. A group of short cells still
        gets a second process as long as all other short cells keep time for one.
        """
        wanted = self.config.protocol.processes
        for count in range(wanted, 1, -1):
            if self.total(remaining, count) <= left_s:
                return count
        if any(effort(planned) > SHORT for planned in group):
            return 1
        own = {planned.cell.key for planned in group}
        others = [planned for planned in remaining if effort(planned) <= SHORT and planned.cell.key not in own]
        fits = self.total(group, 2) + self.total(others, 1) <= SHORT_SHARE * left_s
        return min(wanted, 2) if fits else 1


def processes_for(latency_s: float | None, wanted: int) -> int:
    """Timing processes a call of this length is worth: long calls vary less and cost more."""
    if latency_s is None or latency_s <= REPLICATE_S[0]:
        return wanted
    return min(wanted, 2 if latency_s <= REPLICATE_S[1] else 1)


def effort(planned: Planned) -> int:
    """Class of a cell by the length of its calls: 0 short, then each class up to twice as long as the one before.

    A fast impl at 128k is taken before a slow one at 16k.
    """
    return sum(_latency(planned) > bound for bound in LONG_CALL_S)


def groups(cells: Iterable[Planned], config: Config) -> list[list[Planned]]:
    """Cells that are measured side by side, cheapest group first.

    A group holds all methods and impls at one length, mode and setting whose calls are of one class of duration: a
    reference of many seconds does not keep its length's other impls waiting. Each method's fastest impl goes ahead by
    LEAD classes, so that every method has its curve before any slow impl has its tail.
    """
    cells = list(cells)
    fastest = _fastest(cells)
    found: dict[Any, list[Planned]] = defaultdict(list)
    for planned in cells:
        cell = planned.cell
        ahead = LEAD if cell.key in fastest else 0
        memory = cell.memory if len(config.memory) > 1 and cell.memory is not None else 0
        setting = (
            cell.mode, cell.device, cell.dtype, cell.batch_size, cell.d_model, cell.num_heads, cell.d_ff, memory
        )  # fmt: skip
        found[(max(0, effort(planned) - ahead), cell.seq_len, setting)].append(planned)
    for group in found.values():
        group.sort(key=_latency)
    return [group for _, group in sorted(found.items(), key=lambda item: item[0])]


def _fastest(cells: Iterable[Planned]) -> set[str]:
    """Keys of the cells whose impl is forecast to be the fastest of its method there; sketches with defects aside."""
    best: dict[Any, Planned] = {}
    for planned in cells:
        cell = planned.cell
        if planned.method.impl(cell.impl).defects:
            continue
        rivals = (cell.method, cell.seq_len, cell.mode, cell.device, cell.dtype, cell.batch_size, cell.memory)
        if rivals not in best or _latency(planned) < _latency(best[rivals]):
            best[rivals] = planned
    return {planned.cell.key for planned in best.values()}


def _latency(planned: Planned) -> float:
    return planned.forecast.latency_s or 0.0


def within_budget(plan: Plan) -> list[Planned]:
    """The planned cells that fit the budget at one process each, cheapest group first, as a run would take them."""
    pace, left, fitting = Pace(plan.config), plan.config.budget_s, []
    for group in groups((planned for planned in plan.cells if planned.status == "planned"), plan.config):
        for planned in group:
            left -= pace.cell(planned, processes=1)
            if left >= 0:
                fitting.append(planned)
    return fitting


def _least_samples(latency: float, wanted: int) -> int:
    """Fewest samples of a process: the wanted number of short calls, five below a second, three, one above five."""
    return min(wanted, wanted if latency < 0.1 else 5 if latency < 1.0 else 3 if latency < 5.0 else 1)


def _warm_up(latency: float) -> float:
    """Seconds of warm-up: none where the first call is the sample, one call, three calls, or some time."""
    if latency > 20.0:
        return 0.0
    if latency > 5.0:
        return latency
    return 2 * latency if latency > 0.1 else 3 * latency if latency > 0.01 else 0.2
