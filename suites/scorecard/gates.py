"""Regression gates on real process samples: alarms on identical code, and slow-downs of 3, 5 and 10 % found.

Many processes of one cell are measured once; pairs of runs are drawn from them without replacement, and a slow-down is
a factor on one side. Each gate judges as many processes as its tool takes by default, ctxbench eight: once with what
the reference product timed between the samples tells of the machine's speed, and once on the medians alone.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctxbench.analysis.compare import Side, Verdict, compare
from ctxbench.analysis.processes import pace
from ctxbench.analysis.runs import Run
from ctxbench.cell import Cell
from ctxbench.registry import reload
from ctxbench.rows import Gate, Latency, row_for
from ctxbench.run.client import Server
from ctxbench.run.tasks import Protocol, Task
from ctxbench.suites.scorecard.card import Score
from ctxbench.suites.scorecard.work import CELLS, THREADS, name

POOL, PAIRS = 32, 200
SLOWER = (1.0, 1.03, 1.05, 1.10)
Samples = list[list[float]]  # seconds of each call, by process
Beats = list[list[list[float]]]  # by process: [samples taken before, seconds of the reference]


def measure(tool: str, done: dict[str, Any]) -> Any:
    """The pool's samples; for a gate the share of pairs in % that it calls slower, by how much slower they are."""
    if tool == "pool":
        return _pool()
    pool = done.get("pool")
    if not pool:
        raise RuntimeError("gates/pool is not measured yet")
    return {f"{factor:g}": _alarms(tool, pool["samples"], pool["beats"], factor) for factor in SLOWER}


def scores(raws: dict[str, Any]) -> Iterator[Score]:
    """A line a gate: share of pairs that it calls slower, by how much slower they are."""
    pool = raws.get("pool") or {"samples": [], "beats": []}
    medians = [statistics.median(samples) for samples in pool["samples"]]
    spread = f"the pool's {len(medians)} processes spread by {_spread(medians):.1f} %"
    ratios = [
        median / math.exp(pace(samples, beats))
        for median, samples, beats in zip(medians, pool["samples"], pool["beats"], strict=True)
    ]
    notes = {"ctxbench": f"{spread}, by {_spread(ratios):.1f} % in units of the reference beside their samples"}
    for tool, (count, _) in GATES.items():
        for factor, share in raws.get(tool, {}).items():
            slower = 100 * (float(factor) - 1)
            yield Score(
                section="gates", tool=tool, work=f"{name(CELLS[0])}, {count} process{'es' * (count > 1)} a side",
                quantity=f"{slower:.0f} % slower" if slower else "identical code", value=share,
                unit="% called slower", note=notes.get(tool, spread),
            )  # fmt: skip


def _spread(values: list[float]) -> float:
    return 100 * statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else 0.0


def _alarms(tool: str, pool: Samples, beats: Beats, factor: float) -> float:
    count, judge = GATES[tool]
    random = np.random.default_rng(1)
    alarms = 0
    for _ in range(PAIRS):
        chosen = random.permutation(len(pool))[: 2 * count]
        a = [pool[index] for index in chosen[:count]]
        b = [[factor * value for value in pool[index]] for index in chosen[count:]]
        beside = [[beats[index] for index in side] for side in (chosen[:count], chosen[count:])]
        alarms += judge(a, b, *beside)
    return 100 * alarms / PAIRS


def _pool() -> dict[str, Any]:
    method_name, impl, tokens, mode = CELLS[0]
    method = reload(f"ctxbench.implementations.{method_name}")
    cell = Cell(method=method_name, impl=impl, seq_len=tokens, mode=mode, threads=THREADS, position=method.positions[0])
    protocol = Protocol(sample_budget_s=0.2)
    task = Task(kind="time", cell=cell, origin=f"ctxbench.implementations.{method_name}", protocol=protocol)
    with Server("timing", THREADS) as server:
        outcomes = [server.submit(task, 60.0) for _ in range(POOL)]
    kept = [outcome.samples for outcome in outcomes if outcome.samples is not None]
    return {
        "samples": [found.samples for found in kept],
        "beats": [found.sensors["reference_beside_s"] for found in kept],
    }


def _ours(a: Samples, b: Samples, beats_a: Beats, beats_b: Beats, adjust: bool = True) -> bool:
    cell = Cell(method="pool", impl="i", seq_len=1)
    sides = []
    for label, samples, beats in (("a", a, beats_a), ("b", b, beats_b)):
        medians = [statistics.median(values) for values in samples]
        latency = Latency(
            median=statistics.median(medians), low=min(medians), high=max(medians), samples=samples,
            n_processes=len(samples),
        )  # fmt: skip
        sensors = {"processes": [{"reference_beside_s": seen} for seen in beats]} if adjust else {}
        row = row_for(cell, "ok", latency_s=latency, gate=Gate(ok=True), env_delta=sensors)
        machine = {"environment": {"cpu": {"model": "pool", "cores_usable": 1}}}
        sides.append(Side(Run(Path("/nowhere") / label, (row,), machine)))
    return compare(sides[0], sides[1]).cells[0].verdict is Verdict.SLOWER


def _median_5_percent(a: Samples, b: Samples, *_: Beats) -> bool:
    """``--benchmark-compare-fail=median:5%`` on one process a side."""
    return statistics.median(b[0]) > 1.05 * statistics.median(a[0])


def _asv(a: Samples, b: Samples, *_: Beats) -> bool:
    """``asv continuous`` with its default factor of 1.1 and its own test."""
    from asv._stats import is_different
    from asv_runner.statistics import compute_stats

    one, two = ([value for samples in side for value in samples] for side in (a, b))
    (_, left), (_, right) = compute_stats(one, 1), compute_stats(two, 1)
    return bool(is_different(one, two, left, right)) and statistics.median(two) > 1.1 * statistics.median(one)


GATES: dict[str, tuple[int, Callable[[Samples, Samples, Beats, Beats], bool]]] = {
    "ctxbench": (8, _ours),
    "ctxbench, medians alone": (8, functools.partial(_ours, adjust=False)),
    "pytest-benchmark": (1, _median_5_percent),
    "asv": (2, _asv),
}
TOOLS = ("pool", *GATES)
