"""A laboratory without torch: methods whose cost is planted, and a machine that obeys it on a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sympy import Integer

from ctxbench import suite as suites
from ctxbench.cell import Cell
from ctxbench.config import Config, resolve
from ctxbench.cost import Cost
from ctxbench.cost.roofline import Ceilings
from ctxbench.cost.symbols import B, T, d
from ctxbench.cost.symbols import param as symbol
from ctxbench.method import Impl, Method, Params, no, param
from ctxbench.plan import Plan, build
from ctxbench.registry import Entry, Registry, discover
from ctxbench.rows import Gate, Latency, Row, row_for
from ctxbench.run.progress import Progress
from ctxbench.run.store import Store
from ctxbench.run.supervisor import Summary, Supervisor
from ctxbench.run.tasks import Memory, Outcome, Samples, Task
from ctxbench.suite import Axes, Limits, Protocol, Suite

PRODUCT_S = 1.3e-3  # of the reference on a machine of usual speed
CEILINGS = Ceilings(flops_per_s={"fp32": 1e11}, bytes_per_s=1e10, calibrated=True)


@dataclass(frozen=True)
class WindowParams(Params):
    window: int = param(256, "visible keys", low=1, high=2048)
    rate: float = param(1.0, "a float")
    shared: bool = param(False, "a switch")
    kind: str = param("soft", "a name", choices=("soft", "hard"))


def quadratic(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"attention": 4 * B * d * T**2}
    return Cost(flops, flops, Integer(1000), peak_bytes=4 * B * T * T)


def windowed(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    flops = {"attention": 4 * B * d * T * symbol("window")}
    return Cost(flops, flops, Integer(1000), peak_bytes=4 * B * T * d)


def refuse_odd(dims: Any, params: Any, device: str, dtype: str) -> Any:
    return no("odd lengths are refused") if dims.seq_len % 2 else True


def fails(*_: Any) -> Any:
    raise RuntimeError("planted")


SQUARE = Method(
    name="square",
    build=fails,
    modes=("forward", "train"),
    without={"decode": "nothing is carried"},
    causal=(True, False),
    impls=(Impl("reference"), Impl("fast", support=refuse_odd), Impl("gpu", devices=("cuda",))),
    cost=quadratic,
)
WINDOW = Method(
    name="window",
    build=fails,
    params=WindowParams,
    memory_parameter="window",
    modes=("forward", "stream"),
    causal=(True,),
    positions=("rope", "none"),
    impls=(Impl("reference"),),
    layers=lambda params: 2,
    cost=windowed,
)
PLAIN = Method(name="plain", build=fails)


class Machine:
    """A clock that only children move, and a ledger of what they did. ``law(cell)`` is the seconds of a call.

    ``start_s`` is what a timing process takes beside its calls; the memory process and a gate that is computed, not
    taken over from a shorter cell, take more.
    """

    start_s, gate_s, meters_s = 0.1, 0.2, 0.3

    def __init__(self, law: Callable[[Any], float] | None = None):
        self.law = law or (lambda cell: 2e-8 * cell.seq_len**2 if cell.method == "square" else 5e-6 * cell.seq_len)
        self.time = 1000.0
        self.tasks: list[Task] = []
        self.timeouts: list[float] = []
        self.behaviour: Callable[[Task], Outcome | None] = lambda task: None
        self.closed = 0

    def clock(self) -> float:
        return self.time

    def make(self, heap: str, device: str) -> Machine:
        return self

    def close(self) -> None:
        self.closed += 1

    def submit(self, task: Task, timeout_s: float, memory_limit: int | None) -> Outcome:
        self.tasks.append(task)
        self.timeouts.append(timeout_s)
        outcome = self.behaviour(task)
        if outcome is None:
            outcome = self.timed(task) if task.kind == "time" else self.remembered(task)
        if outcome.elapsed_s > timeout_s:
            outcome = Outcome(status="timeout", reason="no result in time", elapsed_s=timeout_s)
        self.time += outcome.elapsed_s
        return outcome

    def fixed(self, task: Task) -> float:
        gated = task.gate and not task.passed
        return self.start_s + (self.meters_s if task.kind == "memory" else self.gate_s if gated else 0.0)

    def timed(self, task: Task, **changes: Any) -> Outcome:
        call = self.law(task.cell)
        samples = Samples(samples=[call, 1.001 * call, 0.999 * call], cpu=[call] * 3, stop="budget", warmup=[call])
        gate = Gate(ok=True, error=0.0, tolerance=1e-6, stands_for=bool(task.passed)) if task.gate else None
        outcome = Outcome(status="ok", samples=samples, gate=gate, elapsed_s=self.fixed(task) + 4 * call)
        return msgspec.structs.replace(outcome, **changes)

    def remembered(self, task: Task) -> Outcome:
        cell = task.cell
        assert cell is not None
        flops = 4 * cell.d_model * cell.seq_len * (cell.seq_len if cell.method != "window" else cell.params["window"])
        peak = 4 * cell.seq_len * (cell.seq_len if cell.method != "window" else cell.d_model)
        memory = Memory(
            allocated=peak, resident=peak, traced=peak, counted_flops=flops, coverage=1.0, parameters=1000, state=0
        )
        return Outcome(status="ok", memory=memory, elapsed_s=self.fixed(task) + 2 * self.law(cell))

    def rounds(self) -> list[tuple[str, str, int, int]]:
        """Kind, method/impl, length and process of every child, in order."""
        return [
            (task.kind, f"{task.cell.method}/{task.cell.impl}", task.cell.seq_len, task.process)
            for task in self.tasks
            if task.cell is not None
        ]


@dataclass(repr=False)
class Lab:
    """Registry, configurations, plans and runs of the planted methods."""

    folder: Path
    registry: Registry = field(default_factory=Registry)

    def __post_init__(self) -> None:
        for method in (SQUARE, WINDOW, PLAIN):
            self.add(method)

    def add(self, method: Method) -> None:
        self.registry.entries[method.name] = Entry(method, f"tests.{method.name}", "tests")

    def config(
        self, limits: dict[str, Any] | None = None, protocol: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None, **axes: Any,
    ) -> Config:  # fmt: skip
        axes = {"methods": "square", "impls": "reference", "device": "cpu", "seq_len": "1k..4k", **axes}
        limits = {"memory_limit": "16GiB", **(limits or {})}
        flags = Suite(
            axes=Axes(**axes), limits=Limits(**limits), protocol=Protocol(**(protocol or {})), params=params or {}
        )
        name, stack = suites.layers("scaling", flags, self.folder)
        return resolve(name, stack, self.registry)

    def plan(self, config: Config | None = None, finished: Any = (), **axes: Any) -> Plan:
        return build(config or self.config(**axes), self.registry, {"cpu": CEILINGS}, finished)

    def machine(self, law: Callable[[Any], float] | None = None) -> Machine:
        return Machine(law)

    def run(
        self, machine: Machine, config: Config, rerun: str = "", folder: str = "run", progress: Progress | None = None
    ) -> Summary:
        """One session; sessions in the same folder continue each other."""
        with Store.open(self.folder / folder) as store:
            plan = build(config, self.registry, {"cpu": CEILINGS}, store.rows.values())
            return Supervisor(plan, store, {"cpu": CEILINGS}, machine.make, progress, machine.clock).run(rerun)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


class Host:
    """A machine whose speed differs from process to process; a call follows the reference by ``coefficient``."""

    def __init__(self, coefficient: float, sigma: float = 0.01, seed: int = 0):
        self.coefficient, self.sigma, self.random = coefficient, sigma, np.random.default_rng(seed)

    def row(self, seconds: float, slower: Sequence[float], seq_len: int = 1024, method: str = "dense") -> Row:
        """A row whose processes ran while the reference took ``exp(slower)`` of its time."""
        medians = [
            seconds * math.exp(self.coefficient * off + self.random.normal(0, self.sigma)) for off in slower
        ]  # fmt: skip
        beats = [[[taken, PRODUCT_S * math.exp(off)] for taken in range(4)] for off in slower]
        found = discover()[method]
        params = found.params().as_dict()
        cell = Cell(method=method, impl="blocked", seq_len=seq_len, params=params, position=found.positions[0],
                    memory=params.get(found.memory_parameter or ""))  # fmt: skip
        latency = Latency(
            median=float(np.median(medians)), low=min(medians), high=max(medians),
            samples=[[median] * 3 for median in medians], n_processes=len(medians),
        )  # fmt: skip
        return row_for(
            cell, "ok", latency_s=latency,
            env_delta={"processes": [{"reference_beside_s": beat} for beat in beats]},
        )  # fmt: skip

    def run(self, restless: float = 0.1, count: int = 12) -> list[Row]:
        """Two processes of one cell at many lengths."""
        return [self.row(0.01, self.random.normal(0, restless, 2), 256 * (index + 1)) for index in range(count)]


@pytest.fixture
def restless_host() -> type[Host]:
    """Machines whose speed changes."""
    return Host
