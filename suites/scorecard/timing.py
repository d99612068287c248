"""The same calls under every timing tool, with one heap and one thread: how far off, how long it took, how sure it is.

A single process says other than the next process of the same program, and a machine changes: the truth of a cell is the
median of plain loops (truth.py) in fresh processes, half of them right before and half right after the tool.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ctxbench.cell import Cell
from ctxbench.measure.statistics import summarise
from ctxbench.registry import reload
from ctxbench.run.client import HEAPS, Server
from ctxbench.run.tasks import Protocol, Samples, Task
from ctxbench.suites.scorecard.card import Score
from ctxbench.suites.scorecard.work import CELLS, THREADS, name

TRUTH, OURS = 10, 3  # processes
KEPT = {**HEAPS["timing"], "OMP_NUM_THREADS": str(THREADS)}
Stated = tuple[float, float, float]  # seconds: the median, and the interval that the tool prints or stores beside it


def measure(tool: str, done: dict[str, Any]) -> dict[str, Any]:
    """Truth before, what the tool states of each cell, the seconds it took for all of them, truth after."""
    before = _truth()
    started = time.perf_counter()
    stated = TOOLS[tool][0]()
    elapsed = time.perf_counter() - started
    return {"before": before, "stated": stated, "elapsed_s": round(elapsed, 1), "after": _truth()}


def scores(raws: dict[str, Any]) -> Iterator[Score]:
    """A line a tool: bias over the cells, seconds a cell, and whether the truth lies in the interval it states."""
    spreads: dict[str, list[float]] = {}
    for tool, raw in raws.items():
        pairs = list(zip(raw["before"], raw["after"], strict=True))
        truths = [statistics.median(early + late) for early, late in pairs]
        moved = [100 * (statistics.median(late) / statistics.median(early) - 1) for early, late in pairs]
        stated: list[Stated] = [tuple(cell) for cell in raw["stated"]]
        biases = [100 * (median / truth - 1) for (median, _, _), truth in zip(stated, truths, strict=True)]
        inside = sum(low <= truth <= high for (_, low, high), truth in zip(stated, truths, strict=True))
        common = {"section": "timing", "tool": tool, "work": f"{len(CELLS)} cells", "note": TOOLS[tool][1]}
        widths = [50 * (high - low) / median for median, low, high in stated]
        yield Score(quantity="median \\|bias\\|", value=statistics.median(map(abs, biases)), unit="%", **common)
        yield Score(quantity="worst bias", value=max(biases, key=abs), unit="%", **common)
        yield Score(quantity="truth inside", value=inside, unit=f"of {len(CELLS)}", **common)
        yield Score(quantity="stated ±", value=statistics.median(widths), unit="%", **common)
        yield Score(quantity="machine moved by", value=max(moved, key=abs), unit="%", **common)
        yield Score(quantity="seconds a cell", value=raw["elapsed_s"] / len(CELLS), unit="s", **common)
        for cell, sides in zip(CELLS, pairs, strict=True):
            spreads.setdefault(name(cell), []).extend(
                100 * statistics.stdev(side) / statistics.mean(side) for side in sides
            )
    for work, values in spreads.items():
        common = {"section": "timing", "tool": "truth", "work": work, "note": f"{TRUTH // 2} processes at a time"}
        yield Score(quantity="spread of processes", value=statistics.median(values), unit="%", **common)


def _truth() -> list[list[float]]:
    """Medians of fresh processes, ``[cells][processes]``."""
    found = _run([sys.executable, "-m", "ctxbench.suites.scorecard.truth", str(TRUTH // 2)])
    medians: list[list[float]] = json.loads(found.splitlines()[-1])
    return medians


def _ours() -> list[Stated]:
    """As the harness measures: gated children of its own, the cells in turns, summarised as a row is."""
    found: list[list[Samples]] = [[] for _ in CELLS]
    with Server("timing", THREADS) as server:
        for turn in range(OURS):
            for index, (method_name, impl, tokens, mode) in enumerate(CELLS):
                method = reload(f"ctxbench.implementations.{method_name}")
                params = method.params()
                planned = Cell(
                    method=method_name, impl=impl, seq_len=tokens, mode=mode, threads=THREADS, params=params.as_dict(),
                    causal=method.causal[0], position=method.positions[0], num_layers=method.fewest_layers(params),
                )  # fmt: skip
                origin = f"ctxbench.implementations.{method_name}"
                task = Task(kind="time", cell=planned, origin=origin, gate=not turn, process=turn)
                outcome = server.submit(task, 60.0)
                if outcome.samples is None:
                    raise RuntimeError(f"{name(CELLS[index])}: {outcome.status} {outcome.reason}")
                found[index].append(outcome.samples)
    latencies = [summarise(samples, Protocol().precision)[0] for samples in found]
    return [(latency.median, latency.low, latency.high) for latency in latencies]


def _timer() -> list[Stated]:
    program = (
        "from torch.utils.benchmark import Timer\nfrom ctxbench.suites.scorecard.work import call\nimport sys\n"
        "timer = Timer('call()', globals={'call': call(int(sys.argv[1]))}, num_threads=1)\n"
        "found = timer.blocked_autorange(min_run_time=0.5)\n"
        "low, high = (torch.quantile(torch.tensor(found.times), share).item() for share in (0.25, 0.75))\n"
        "print(found.median, low, high)\n"
    )
    program = f"import torch\n{program}"
    shown = [_run([sys.executable, "-c", program, str(index)]).split()[-3:] for index in range(len(CELLS))]
    return [(float(median), float(low), float(high)) for median, low, high in shown]


def _pytest_benchmark() -> list[Stated]:
    program = (
        "import pytest\nfrom ctxbench.suites.scorecard.work import CELLS, call\n"
        "@pytest.mark.parametrize('index', range(len(CELLS)))\n"
        "def test_call(benchmark, index):\n    benchmark(call(index))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        test, out = Path(folder) / "test_calls.py", Path(folder) / "out.json"
        test.write_text(program)
        _run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}", str(test)])
        found = json.loads(out.read_text())["benchmarks"]
    stats = [bench["stats"] for bench in sorted(found, key=lambda bench: bench["params"]["index"])]
    return [(one["median"], one["q1"], one["q3"]) for one in stats]


def _pyperf() -> list[Stated]:
    """With four processes: its default of twenty takes minutes a cell, because each imports torch anew."""
    program = (
        "import pyperf\nfrom ctxbench.suites.scorecard.work import call\nimport os\n"
        "runner = pyperf.Runner(processes=4)\nrunner.bench_func('call', call(int(os.environ['SCORECARD_CELL'])))\n"
    )
    stated = []
    for index in range(len(CELLS)):
        with tempfile.TemporaryDirectory() as folder:
            script, out = Path(folder) / "bench.py", Path(folder) / "out.json"
            script.write_text(program)
            inherited = ",".join(["SCORECARD_CELL", "PYTHONPATH", *KEPT])
            _run(
                [sys.executable, str(script), "-q", "-o", str(out), f"--inherit-environ={inherited}"],
                SCORECARD_CELL=str(index),
            )
            runs = json.loads(out.read_text())["benchmarks"][0]["runs"]
        values = [value for run in runs for value in run.get("values", [])]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        stated.append((statistics.median(values), mean - deviation, mean + deviation))
    return stated


def _asv() -> list[Stated]:
    suite = (
        "from ctxbench.suites.scorecard.work import CELLS, call\nclass Suite:\n    params = list(range(len(CELLS)))\n"
        "    def setup(self, index):\n        self.call = call(index)\n"
        "    def time_call(self, index):\n        self.call()\n"
    )
    config = {
        "version": 1,
        "project": "calls",
        "repo": ".",
        "environment_type": "existing",
        "benchmark_dir": "benchmarks",
    }
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        (folder / "benchmarks").mkdir()
        (folder / "benchmarks" / "__init__.py").touch()
        (folder / "benchmarks" / "calls.py").write_text(suite)
        (folder / "asv.conf.json").write_text(json.dumps(config))
        identity = ["-c", "user.name=asv", "-c", "user.email=asv@localhost"]
        for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "calls"]):
            subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
        asv = [sys.executable, "-m", "asv"]
        _run([*asv, "machine", "--yes", "--machine", "here"], cwd=folder, HOME=str(folder))  # it writes into the home
        shown = _run([*asv, "run", "--python=same", "--machine", "here"], cwd=folder, HOME=str(folder))
    found = {index: (median, median - half, median + half) for index, median, half in asv_rows(shown)}
    if sorted(found) != list(range(len(CELLS))):
        raise RuntimeError(f"asv printed no table of {len(CELLS)} cells: {shown[-800:]}")
    return [found[index] for index in range(len(CELLS))]


def asv_rows(shown: str) -> Iterator[tuple[int, float, float]]:
    """Parameter, median and half interval in seconds of each line of its table: ``0   81.0±8ms``."""
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "μs": 1e-6, "\u00b5s": 1e-6, "ns": 1e-9}
    line = r"^\W*(\d+)\s+([\d.]+)±([\d.]+)\s?(n?m?s|[uμ\u00b5]s)\s*$"
    for index, value, half, unit in re.findall(line, shown, re.MULTILINE):
        yield int(index), float(value) * units[unit], float(half) * units[unit]


def _run(command: list[str], cwd: Path | None = None, **variables: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **KEPT, **variables}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


TOOLS: dict[str, tuple[Callable[[], list[Stated]], str]] = {
    "ctxbench": (_ours, f"gated first; range of {OURS} processes, a bootstrap from five on"),
    "torch.utils.benchmark": (_timer, "quartiles of one process"),
    "pytest-benchmark": (_pytest_benchmark, "quartiles of one process"),
    "pyperf": (_pyperf, "mean ± deviation of all values; 4 processes, its default is 20"),
    "asv": (_asv, "median ± its error, from two processes"),
}
