"""What the harness itself costs, whether its medians are those of ``torch.utils.benchmark``, how fast it counts.

``python -m ctxbench.suites.benchmarks.bench_harness`` prints the tables on an idle machine; it takes about two minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import pytest

from ctxbench.cell import Cell
from ctxbench.method import Dims
from ctxbench.registry import reload
from ctxbench.run.client import Server
from ctxbench.run.tasks import Protocol, Task
from ctxbench.suites.benchmarks.ratios import with_kept_heap

ORIGIN = "ctxbench.implementations.dense"
MIB = 2**20
FIXED_LIMIT_S, AGREEMENT = 0.6, 0.03
COUNTED_LENGTH, COUNT_LIMIT_S, COUNT_LIMIT_BYTES = 131072, 2.0, 500 * 10**6
START_LIMIT = 8  # times an empty Python process
TABLES = ("start", "fixed", "medians", "counting")
SIDE_BY_SIDE = (("blocked", 512, "forward"), ("blocked", 2048, "forward"), ("reference", 1024, "forward"),
                ("reference", 1024, "train"))  # fmt: skip


def starts(repeats: int = 15) -> list[tuple[str, float, float]]:
    """Median seconds of commands that measure nothing, and of an empty Python process in turns with each.

    With their bytecode, as an installed package has it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def spent(code: str, *arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=True)
        return time.perf_counter() - started

    found = []
    for command in ("--help", "list"):
        code = "from ctxbench.cli import main; main()"
        spent(code, command)  # writes the bytecode
        pairs = [(spent(code, command), spent("pass")) for _ in range(repeats)]
        found.append((command, *(statistics.median(seconds) for seconds in zip(*pairs, strict=True))))
    return found


def fixed_costs(threads: int, repeats: int = 5) -> list[tuple[str, float]]:
    """Median seconds of a child without the calls it measures: start, import of the method, build, book-keeping."""
    cell = Cell(method="dense", impl="blocked", seq_len=1024, threads=threads)
    with Server("timing", threads) as timing, Server("memory", threads) as memory:
        plain = Task(kind="time", cell=cell, origin=ORIGIN)
        gated = Task(kind="time", cell=cell, origin=ORIGIN, gate=True)
        timing.submit(plain, 60.0)
        call_s = [0.0]

        def without_calls(task: Task) -> float:
            started = time.perf_counter()
            outcome = timing.submit(task, 60.0, 2**32)
            spent = time.perf_counter() - started
            assert outcome.samples is not None, outcome
            call_s[0] = statistics.median(outcome.samples.samples)
            return spent - sum(outcome.samples.samples) - sum(outcome.samples.warmup)

        def without_two_calls() -> float:
            started = time.perf_counter()
            outcome = memory.submit(Task(kind="memory", cell=cell, origin=ORIGIN), 60.0, 2**32)
            assert outcome.memory is not None, outcome
            return time.perf_counter() - started - 2 * call_s[0]

        def of_trace() -> float:
            started = time.perf_counter()
            timing.submit(Task(kind="trace", cell=cell, origin=ORIGIN), 60.0, 2**32)
            return time.perf_counter() - started

        rows = {
            "timing child": lambda: without_calls(plain),
            "timing child with the gate": lambda: without_calls(gated),
            "memory child": without_two_calls,
            "trace child": of_trace,
        }
        return [(name, statistics.median(measure() for _ in range(repeats))) for name, measure in rows.items()]


def side_by_side(threads: int, rounds: int = 5) -> list[tuple[str, float, float]]:
    """``(what, our median, torch's median)`` in seconds, measured in turns in one process with one heap."""
    import torch
    from torch.utils.benchmark import Timer

    from ctxbench import workload
    from ctxbench.measure import latency

    torch.set_num_threads(threads)
    method, found = reload(ORIGIN), []
    torch.empty(256 * MIB, dtype=torch.uint8).zero_()  # both find the heap already faulted in
    for impl, seq_len, mode in SIDE_BY_SIDE:
        work = workload.prepare(method, Dims(seq_len), method.params(), impl, mode, "fp32")
        timer = Timer("call()", globals={"call": work.call}, num_threads=threads)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(statistics.median(latency.measure(work.call, Protocol()).samples))
            theirs.append(timer.blocked_autorange(min_run_time=0.5).median)
        found.append((f"dense/{impl} {mode} {seq_len}", statistics.median(ours), statistics.median(theirs)))
    return found


class Counting(NamedTuple):
    """What the tracer took for one impl: CPU seconds and bytes of the process above those before."""

    name: str
    seconds: float
    grown_bytes: int


def counting() -> Iterator[Counting]:
    """Trace every impl in every mode at 128k tokens, in this process."""
    from ctxbench.cost.trace import trace
    from ctxbench.registry import discover

    for method in discover():
        params = method.params()
        dims = Dims(
            COUNTED_LENGTH, causal=method.causal[0], position=method.positions[0],
            num_layers=method.fewest_layers(params),
        )  # fmt: skip
        for impl in method.impls:
            for mode in impl.modes or method.modes:
                if method.mode_support(mode, dims, params) and method.impl_support(
                    impl, mode, dims, params, "cpu", "fp32"
                ):
                    before, started = psutil.Process().memory_info().rss, time.process_time()
                    trace(method, dims, params, impl.name, mode)
                    seconds = time.process_time() - started
                    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
                    yield Counting(f"{method.name}/{impl.name} {mode}", seconds, grown)


def main() -> int:
    """Print the tables; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m ctxbench.suites.benchmarks.bench_harness", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", choices=TABLES, action="append", help="print this table only; repeatable")
    arguments = parser.parse_args()
    with_kept_heap()
    tables, show, reached = arguments.table or TABLES, sys.stdout.write, True
    if "start" in tables:
        show(f"start of a command against an empty Python process (limit {START_LIMIT} times)\n")
        for name, ours, empty in starts():
            reached &= ours < START_LIMIT * empty
            show(f"  ctxbench {name:21} {1e3 * ours:9.3f} ms {1e3 * empty:9.3f} ms   {ours / empty:7.2f}\n")
    if "fixed" in tables:
        show(f"fixed cost of a child, {arguments.threads} threads, without its calls (limit {FIXED_LIMIT_S} s)\n")
        for name, seconds in fixed_costs(arguments.threads):
            reached &= seconds < FIXED_LIMIT_S
            show(f"  {name:30} {seconds:7.3f} s\n")
    if "medians" in tables:
        show(f"median of a call against torch.utils.benchmark, equal threads and heap (limit {AGREEMENT:.0%})\n")
        for name, ours, theirs in side_by_side(arguments.threads):
            reached &= abs(ours / theirs - 1) < AGREEMENT
            show(f"  {name:30} {1e3 * ours:9.3f} ms {1e3 * theirs:9.3f} ms   {ours / theirs - 1:+7.2%}\n")
    if "counting" in tables:
        limits = f"limits {COUNT_LIMIT_S:g} CPU seconds, {COUNT_LIMIT_BYTES / 1e6:.0f} MB"
        show(f"counting at {COUNTED_LENGTH} tokens ({limits})\n")
        for counted in counting():
            kept = counted.seconds < COUNT_LIMIT_S and counted.grown_bytes < COUNT_LIMIT_BYTES
            reached &= kept
            missed = "" if kept else "   missed"
            show(f"  {counted.name:42} {counted.seconds:6.2f} s {counted.grown_bytes / 1e6:6.0f} MB{missed}\n")
    show("every limit kept\n" if reached else "some limits were missed\n")
    return 0 if reached else 1


@pytest.fixture(scope="module")
def server() -> Any:
    with Server("timing", threads=1) as server:
        yield server


@pytest.mark.parametrize("kind", ["trace", "time"])
def test_child(benchmark: Any, server: Server, kind: str) -> None:
    cell = Cell(method="dense", impl="blocked", seq_len=64, d_model=32, num_heads=2, d_ff=64, threads=1)
    task = Task(kind=kind, cell=cell, origin=ORIGIN, protocol=Protocol(min_samples=3, sample_budget_s=0.001))
    benchmark.extra_info.update(cell=cell.key, kind=kind)
    outcome = benchmark.pedantic(server.submit, (task, 60.0), rounds=5, warmup_rounds=1)
    assert outcome.status == "ok"


def test_stopwatch(benchmark: Any) -> None:
    from ctxbench.measure.latency import cpu_stopwatch

    benchmark.pedantic(cpu_stopwatch, (int,), rounds=20, iterations=100, warmup_rounds=2)


def test_gate(benchmark: Any) -> None:
    from ctxbench.measure.gate import run_gate

    cell = Cell(method="dense", impl="blocked", seq_len=1024)
    method = reload(ORIGIN)
    gate = benchmark.pedantic(run_gate, (method, cell), rounds=5, warmup_rounds=1)
    assert gate.ok


if __name__ == "__main__":
    sys.exit(main())
