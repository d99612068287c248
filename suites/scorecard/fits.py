"""Planted curves, 5 % noise: what exponent each tool sees at the longest length, against the one that is there."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctxbench.suites.scorecard.card import Score

LENGTHS = [1 << power for power in range(9, 17)]
NOISE, REPEATS, PROCESSES, RIGHT = 0.05, 20, 5, 0.1
CURVES: dict[str, Callable[[float], float]] = {
    "N": lambda n: 1e-6 * n,
    "N^1.5": lambda n: 1e-8 * n**1.5,
    "N^2": lambda n: 1e-10 * n**2,
    "1 ms + N": lambda n: 1e-3 + 1e-7 * n,
    "N + N^2 / 8k": lambda n: 1e-7 * (n + n * n / 8192),
    "window of 4k": lambda n: 1e-10 * n * min(n, 4096),
}
GOOGLE = {"(1)": 0.0, "lgN": 0.0, "N": 1.0, "NlgN": 1.0, "N^2": 2.0, "N^3": 3.0}
BIG_O = {"Constant": 0.0, "Logarithmic": 0.0, "Linear": 1.0, "Linearithmic": 1.0, "Quadratic": 2.0, "Cubic": 3.0}


def true_exponent(curve: Callable[[float], float]) -> float:
    """``d log t / d log N`` at the longest length, from below: where a window begins, the curve has a corner."""
    n = float(LENGTHS[-1])
    return math.log(curve(n) / curve(n / 1.01)) / math.log(1.01)


def draws(name: str, repeat: int) -> np.ndarray:
    """Seconds of each process at each length, ``[lengths, processes]``."""
    random = np.random.default_rng([sorted(CURVES).index(name), repeat])
    exact = np.array([CURVES[name](n) for n in LENGTHS])[:, None]
    return np.asarray(exact * np.exp(random.normal(0, NOISE, (len(LENGTHS), PROCESSES))))


def measure(tool: str, done: dict[str, dict[str, list[float | None]]]) -> dict[str, list[float | None]]:
    """Exponents at the longest length, one a repeat, by curve; None where the tool names none."""
    return {name: list(TOOLS[tool](name)) for name in CURVES}


def scores(raws: dict[str, dict[str, list[float | None]]]) -> Iterator[Score]:
    """A line a tool and curve: median exponent, and the share of repeats within 0.1 of the truth."""
    for tool, curves in raws.items():
        for name, exponents in curves.items():
            found = [value for value in exponents if value is not None]
            truth = true_exponent(CURVES[name])
            common = {"section": "fits", "tool": tool, "work": name}
            yield Score(quantity="true exponent", value=truth, **common)
            yield Score(quantity="median exponent", value=statistics.median(found) if found else None, **common)
            right = 100 * sum(abs(value - truth) <= RIGHT for value in found) / len(exponents)
            yield Score(quantity=f"within {RIGHT}", value=right, unit="% of repeats", **common)


def _ours(name: str) -> Iterator[Any]:
    from ctxbench.analysis.scaling import scalings
    from ctxbench.cell import Cell
    from ctxbench.rows import Latency, row_for

    for repeat in range(REPEATS):
        rows = []
        for length, seconds in zip(LENGTHS, draws(name, repeat), strict=True):
            latency = Latency(
                median=float(np.median(seconds)), low=min(seconds), high=max(seconds),
                samples=[[float(value)] for value in seconds], n_processes=PROCESSES,
            )  # fmt: skip
            rows.append(row_for(Cell(method="planted", impl="i", seq_len=length), "ok", latency_s=latency))
        (found,) = scalings(rows)
        yield found


def _big_o(name: str) -> Iterator[float | None]:
    import big_o

    for repeat in range(REPEATS):
        times = np.median(draws(name, repeat), axis=1)
        best, _ = big_o.infer_big_o_class(np.array(LENGTHS), times)
        kind = type(best).__name__
        yield float(best.coeff[1]) if kind == "Polynomial" else BIG_O.get(kind)


GOOGLE_PROGRAM = """
import json, sys
import google_benchmark as benchmark
planted = json.load(open(sys.argv.pop(1)))
def planted_benchmark(name, times):
    @benchmark.register(name=name)
    @benchmark.option.use_manual_time()
    @benchmark.option.iterations(1)
    @benchmark.option.range_multiplier(2)
    @benchmark.option.range(min(map(int, times)), max(map(int, times)))
    @benchmark.option.complexity(benchmark.oAuto)
    def run(state):
        while state:
            state.set_iteration_time(times[str(state.range(0))])
        state.complexity_n = state.range(0)
for name, times in planted.items():
    planted_benchmark(name, times)
benchmark.main()
"""


def _google(name: str) -> list[float | None]:
    """Its own library fits; only the clock is planted."""
    planted = {
        str(repeat): dict(zip(map(str, LENGTHS), map(float, np.median(draws(name, repeat), axis=1)), strict=True))
        for repeat in range(REPEATS)
    }
    with tempfile.TemporaryDirectory() as folder:
        program, data, out = (Path(folder) / part for part in ("program.py", "planted.json", "out.json"))
        program.write_text(GOOGLE_PROGRAM)
        data.write_text(json.dumps(planted))
        command = [sys.executable, str(program), str(data), f"--benchmark_out={out}", "--benchmark_out_format=json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        if done.returncode:
            raise RuntimeError(f"google-benchmark failed: {done.stderr[-500:]}")
        report: dict[str, Any] = json.loads(out.read_text())
    return [GOOGLE.get(row["big_o"]) for row in report["benchmarks"] if row.get("aggregate_name") == "BigO"]


TOOLS: dict[str, Callable[[str], Iterable[float | None]]] = {
    "ctxbench, last step": lambda name: (found.steps[-1].value for found in _ours(name)),
    "ctxbench, tail": lambda name: (found.tail.value for found in _ours(name)),
    "big-O": _big_o,
    "google-benchmark": _google,
}
