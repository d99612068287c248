"""How long cells take to measure, in which order they are taken, and how many processes the budget allows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ctxbench.config import Config
from ctxbench.plan import Plan, Planned
from ctxbench.rows import Gate

# Seconds of a process beside its calls, by its kind, before any has ended: start, import of the method, build; then
# the gate, or the tracer.
FIXED_S = {"cpu": {"time": 0.3, "gate": 0.5, "memory": 0.6}, "cuda": {"time": 4.0, "gate": 4.5, "memory": 4.5}}
MEMORY_CALLS, ONE_MEMORY_CALL_S = 2, 0.1  # one call a meter; above this many seconds both meters share one
LEARNING_RATE = 0.1  # weight of the newest process once ten have ended; the first ones weigh the same
LONG_CALL_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # cells are taken class by class, by the length of a call
LEAD = 3  # classes by which a method's fastest sound impl goes ahead of its other ones
REACH = 16_384  # tokens up to which it goes ahead of everything, so that all methods can be compared there
REPLICATE_S = (2.0, 5.0)  # a call above the first is worth two processes, above the second one
SHORT = 1  # the last class of cells that are measured apart from longer ones of their length
SHARE = 0.85  # of the time left that is planned with where it is scarce; forecasts are sometimes low


@dataclass
class Pace:
    """Predicted wall seconds of child processes; learns their fixed cost, by kind, from the ones that have ended."""

    config: Config
    cells: list[Planned] = field(default_factory=list)  # of the whole plan
    fixed_s: dict[str, float] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)  # processes that have taught, by kind
    passed: dict[Any, list[Gate]] = field(default_factory=dict)  # by series: a longer cell's gate is often the same

    def __post_init__(self) -> None:
        devices = [FIXED_S[device.partition(":")[0]] for device in self.config.device]
        self.fixed_s = {kind: max(device[kind] for device in devices) for kind in devices[0]}

    def time_child(self, latency_s: float | None, gate: bool = False) -> float:
        """One timing process of a cell whose call takes this long."""
        latency, protocol = latency_s or 0.0, self.config.protocol
        least = _least_samples(latency, protocol.min_samples) * latency
        sampling = min(max(least, protocol.sample_budget), max(protocol.sample_cap, latency))
        return self.fixed("gate" if gate and protocol.gate else "time") + _warm_up(latency) + sampling

    def memory_child(self, latency_s: float | None) -> float:
        """The memory process of a cell whose call takes this long."""
        return self.fixed("memory") + _memory_calls(latency_s)

    def fixed(self, kind: str) -> float:
        """Seconds of a process beside its calls. One without the gate takes no longer than one with it."""
        if kind == "time" and not self.seen["time"] and self.seen["gate"]:
            return min(self.fixed_s["time"], self.fixed_s["gate"])
        return self.fixed_s[kind]

    def cell(self, planned: Planned, processes: int | None = None) -> float:
        """A whole cell with at most this many timing processes."""
        latency = planned.forecast.latency_s
        count = processes_for(latency, processes or self.config.protocol.processes)
        gate = planned.series not in self.passed
        return self.time_child(latency, gate) + self.memory_child(latency) + (count - 1) * self.time_child(latency)

    def total(self, cells: Iterable[Planned], processes: int | None = None) -> float:
        """All of these cells."""
        return sum(self.cell(planned, processes) for planned in cells)

    def replicates(self, calls_s: Iterable[float | None], processes: int) -> float:
        """The further processes of cells whose first one found calls of these lengths."""
        return sum((processes_for(call_s, processes) - 1) * self.time_child(call_s) for call_s in calls_s)

    def learn(self, kind: str, elapsed_s: float, calls_s: float | None = None, call_s: float | None = None) -> None:
        """Correct a fixed cost by a process that took ``elapsed_s``.

        Of that, ``calls_s`` went into calls; where that is not known, those of a memory process whose calls take
        ``call_s``. A time process is of kind ``gate`` when it passed the gate first.
        """
        fixed = max(elapsed_s - (_memory_calls(call_s) if calls_s is None else calls_s), 0.0)
        self.seen[kind] += 1
        self.fixed_s[kind] += max(LEARNING_RATE, 1 / self.seen[kind]) * (fixed - self.fixed_s[kind])

    def everywhere(self, waiting: Iterable[Planned], left_s: float, calls_s: Collection[float | None] = ()) -> int:
        """Timing processes that every waiting cell can have in the seconds left; 0 where one each hardly fits.

        As many has each cell that has begun, whose calls take ``calls_s``.
        """
        waiting = list(waiting)
        for count in range(self.config.protocol.processes, 0, -1):
            needed = self.replicates(calls_s, count) + self.total(waiting, count)
            if needed <= (left_s if count > 1 else SHARE * left_s):
                return count
        return 0

    def fastest(self, calls_s: Mapping[str, float | None] | None = None) -> set[str]:
        """Keys of the cells of each method's fastest impl: by forecast, or by the calls of cells that have begun."""
        return _fastest(self.cells, calls_s)

    def worth_beginning(
        self, planned: Planned, waiting: Iterable[Planned], left_s: float, calls_s: Collection[float | None],
        fastest: set[str],
    ) -> bool:  # fmt: skip
        """Whether a cell should begin where time is too short for one process of every cell that waits.

        A number from one process says little. So a method's fastest impl always may, but a slower one only if it can
        have two processes, as can all cells that have begun, with calls of ``calls_s``, and the ones that bring each
        method to REACH.
        """
        if planned.cell.key in fastest:
            return True
        two = min(2, self.config.protocol.processes)
        kept = self.total(self._on_the_way(waiting, left_s, fastest), two)
        return self.cell(planned, two) + self.replicates(calls_s, two) + kept <= SHARE * left_s

    def _on_the_way(self, waiting: Iterable[Planned], left_s: float, fastest: set[str]) -> list[Planned]:
        """Those that bring each method to REACH, but for the ones that could not have even a process in that time."""
        return [
            planned
            for planned in waiting
            if _is_first(planned, fastest) and self.cell(planned, 1) <= SHARE * left_s
        ]  # fmt: skip

    def shares(
        self, begun: Mapping[str, float | None], waiting: Iterable[Planned], left_s: float, fastest: set[str]
    ) -> dict[str, int]:
        """Timing processes of each cell whose first one has ended, by key; ``begun`` are the seconds of their calls.

        As many as everything that waits can have. Where that is one or none, there are second ones, each method's
        fastest impl first, in the time that is left when everything, or else what brings each method to REACH, has
        one; and then third ones for the latter cells, as long as all of them can have three.
        """
        waiting, wanted = list(waiting), self.config.protocol.processes
        everywhere = self.everywhere(waiting, left_s, begun.values())
        count = max(everywhere, 1)
        found, spent = dict.fromkeys(begun, count), self.replicates(begun.values(), count)
        firsts = self._on_the_way(waiting, left_s, fastest)
        reach = {planned.cell.key for planned in self.cells if _is_first(planned, fastest)}
        for more in range(count + 1, wanted + 1):
            kept = self.total(waiting, count) if everywhere else self.total(firsts, more if more > 2 else 1)
            for key in sorted(begun, key=lambda key: (key not in fastest, begun[key] or 0.0)):
                if found[key] < more - 1 or processes_for(begun[key], more) < more or (more > 2 and key not in reach):
                    continue
                cost = self.time_child(begun[key])
                if spent + cost + kept <= SHARE * left_s:
                    found[key], spent = more, spent + cost
        return found


def _memory_calls(latency_s: float | None) -> float:
    latency = latency_s or 0.0
    return latency * (MEMORY_CALLS if latency <= ONE_MEMORY_CALL_S else 1.2)


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


def groups(cells: Iterable[Planned], config: Config, rivals: Iterable[Planned] | None = None) -> list[list[Planned]]:
    """Cells that are measured side by side, cheapest group first.

    A group holds all methods and impls at one length, mode and setting whose calls are of one class of duration: a
    reference of many seconds does not keep its length's other impls waiting. Each method's fastest impl goes ahead by
    LEAD classes, so that every method has its curve before any slow impl has its tail, and up to REACH ahead of all.
    ``rivals`` are the cells it is the fastest of: the whole plan, where some of it is measured already.
    """
    cells = list(cells)
    fastest = _fastest(cells if rivals is None else rivals)
    found: dict[Any, list[Planned]] = defaultdict(list)
    for planned in cells:
        cell = planned.cell
        place = 0 if _is_first(planned, fastest) else effort(planned) - (LEAD if cell.key in fastest else 0)
        memory = cell.memory if len(config.memory) > 1 and cell.memory is not None else 0
        setting = (
            cell.mode, cell.device, cell.dtype, cell.batch_size, cell.d_model, cell.num_heads, cell.d_ff, memory
        )  # fmt: skip
        found[(max(0, place), cell.seq_len, effort(planned) > SHORT, setting)].append(planned)
    for group in found.values():
        group.sort(key=_latency)
    return [group for _, group in sorted(found.items(), key=lambda item: item[0])]


def _fastest(cells: Iterable[Planned], calls_s: Mapping[str, float | None] | None = None) -> set[str]:
    """Keys of the cells whose impl is forecast to be the fastest of its method there; sketches with defects aside.

    ``calls_s`` are seconds of calls, by key, where they are known better than by forecast.
    """
    best: dict[Any, tuple[float, str]] = {}
    for planned in cells:
        cell = planned.cell
        if planned.status != "planned" or planned.method.impl(cell.impl).defects:
            continue
        rivals = (cell.method, cell.seq_len, cell.mode, cell.device, cell.dtype, cell.batch_size, cell.memory)
        seconds = (calls_s or {}).get(cell.key) or _latency(planned)
        if rivals not in best or seconds < best[rivals][0]:
            best[rivals] = seconds, cell.key
    return {key for _, key in best.values()}


def _is_first(planned: Planned, fastest: set[str]) -> bool:
    """Whether a cell is one of those that bring each method to REACH."""
    return planned.cell.key in fastest and planned.cell.seq_len <= REACH


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
