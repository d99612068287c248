"""The same calls under every timing tool, with one heap and one thread: how far off, how long it took, how sure it is.

The truth of a cell is the median of TRUTH process medians, taken half before and half after the tools, because what a
single process says differs from the next process of the same program.
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

from ctxbench.cell import Cell
from ctxbench.registry import reload
from ctxbench.run.client import HEAPS, Server
from ctxbench.run.tasks import Protocol, Task
from ctxbench.suites.scorecard.card import Score, absent
from ctxbench.suites.scorecard.work import CELLS, THREADS, name

TRUTH, OURS = 12, 3
KEPT = {**HEAPS["timing"], "OMP_NUM_THREADS": str(THREADS)}


def scores() -> Iterator[Score]:
    """A line a tool: median and worst bias over the cells, seconds a cell, and what it says of its own uncertainty."""
    before = [processes(cell, TRUTH // 2) for cell in CELLS]
    found: dict[str, tuple[list[float], float]] = {}
    for tool, (distribution, measure, _) in TOOLS.items():
        if distribution and absent("timing", distribution):
            yield from absent("timing", distribution)
            continue
        started = time.perf_counter()
        medians = measure()
        found[tool] = medians, (time.perf_counter() - started) / len(CELLS)
    after = [processes(cell, TRUTH // 2) for cell in CELLS]
    truth = [statistics.median(early + late) for early, late in zip(before, after, strict=True)]
    for tool, (medians, seconds) in found.items():
        biases = [100 * (value / exact - 1) for value, exact in zip(medians, truth, strict=True)]
        size = [abs(bias) for bias in biases]
        common = {"section": "timing", "tool": tool, "work": f"{len(CELLS)} cells", "note": TOOLS[tool][2]}
        yield Score(quantity="median |bias|", value=statistics.median(size), unit="%", **common)
        yield Score(quantity="worst bias", value=biases[size.index(max(size))], unit="%", **common)
        yield Score(quantity="seconds a cell", value=seconds, unit="s", **common)
    for cell, early, late in zip(CELLS, before, after, strict=True):
        values = sorted(early + late)
        spread = 100 * (statistics.stdev(values) / statistics.mean(values))
        common = {"section": "timing", "tool": "truth", "work": name(cell), "note": f"{len(values)} processes"}
        yield Score(quantity="spread of processes", value=spread, unit="%", **common)


def processes(cell: tuple[str, str, int, str], count: int) -> list[float]:
    """Medians of fresh processes by the harness's own children."""
    method_name, impl, tokens, mode = cell
    method = reload(f"ctxbench.implementations.{method_name}")
    params = method.params()
    planned = Cell(
        method=method_name, impl=impl, seq_len=tokens, mode=mode, threads=THREADS, causal=method.causal[0],
        position=method.positions[0], num_layers=method.fewest_layers(params), params=params.as_dict(),
    )  # fmt: skip
    task = Task(kind="time", cell=planned, origin=f"ctxbench.implementations.{method_name}", protocol=Protocol())
    with Server("timing", THREADS) as server:
        outcomes = [server.submit(task, 60.0) for _ in range(count)]
    return [statistics.median(outcome.samples.samples) for outcome in outcomes if outcome.samples is not None]


def _ours() -> list[float]:
    return [statistics.median(processes(cell, OURS)) for cell in CELLS]


def _timer() -> list[float]:
    program = (
        "from torch.utils.benchmark import Timer\nfrom ctxbench.suites.scorecard.work import call\nimport sys\n"
        "timer = Timer('call()', globals={'call': call(int(sys.argv[1]))}, num_threads=1)\n"
        "print(timer.blocked_autorange(min_run_time=0.5).median)\n"
    )
    return [float(_run([sys.executable, "-c", program, str(index)]).split()[-1]) for index in range(len(CELLS))]


def _pytest_benchmark() -> list[float]:
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
    return [bench["stats"]["median"] for bench in sorted(found, key=lambda bench: bench["params"]["index"])]


def _pyperf() -> list[float]:
    """With six processes: its default of twenty takes minutes a cell, because each imports torch anew."""
    program = (
        "import pyperf\nfrom ctxbench.suites.scorecard.work import call\nimport os\n"
        "runner = pyperf.Runner(processes=6)\nrunner.bench_func('call', call(int(os.environ['SCORECARD_CELL'])))\n"
    )
    medians = []
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
        medians.append(statistics.median(value for run in runs for value in run.get("values", [])))
    return medians


def _asv() -> list[float]:
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
        arguments = ["run", "--python=same", "--machine", "here", "-v"]
        _run([sys.executable, "-m", "asv", "machine", "--yes", "--machine", "here"], cwd=folder)
        shown = _run([sys.executable, "-m", "asv", *arguments], cwd=folder)
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "\u03bcs": 1e-6, "\u00b5s": 1e-6}
    found = {
        int(index): float(value) * units[unit]
        for index, value, unit in re.findall(
            r"^\W*(\d+)\s+([\d.]+)±\S*?\s?(m?s|[u\u03bc\u00b5]s)\s*$", shown, re.MULTILINE
        )
    }
    if len(found) != len(CELLS):
        raise RuntimeError(f"asv printed no table of {len(CELLS)} cells: {shown[-800:]}")
    return [found[index] for index in range(len(CELLS))]


def _run(command: list[str], cwd: Path | None = None, **variables: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **KEPT, **variables}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


TOOLS: dict[str, tuple[str, Callable[[], list[float]], str]] = {
    "ctxbench": ("", _ours, "interval over processes, outliers and contention marked"),
    "torch.utils.benchmark": ("", _timer, "quartiles of one process"),
    "pytest-benchmark": ("pytest-benchmark", _pytest_benchmark, "quartiles of one process"),
    "pyperf": ("pyperf", _pyperf, "spread over processes; 6 of its default 20"),
    "asv": ("asv", _asv, "interval from two processes"),
}
