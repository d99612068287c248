"""Running the programs beside the tests: what a kernel computes, against float64, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Roundings of independent elements an error is made of, in units of the dtype. fp16: probabilities, their gradient, the
# output and the result. fp32: the exponent multiplies the scores' own rounding by their size, a handful.
TOLERANCE = {"bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11, "fp32": 16 * 2.0**-24}


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a program of this folder with or without Triton's interpreter; its lines of JSON.

    On a device kernels are compiled first, which takes longer than all they do: several processes share the runs.
    """

    def run(name: str, *arguments: str, interpret: bool) -> list[Any]:
        pytest.importorskip("triton")
        on_device = not interpret and name.endswith("_parity.py")
        count = (
            max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) if on_device else 1
        )
        kept = os.environ.get("TRITON_CACHE_DIR") if on_device else None
        changes = {"TRITON_INTERPRET": "1" if interpret else "0", "TRITON_CACHE_DIR": kept or str(tmp_path)}
        processes = [
            subprocess.Popen(
                [sys.executable, HERE / name, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | changes | {"SHARE": f"{own}/{count}"},
            )
            for own in range(count)
        ]  # fmt: skip
        with ThreadPoolExecutor(count) as pool:  # whose output nobody reads would wait for ever
            outputs = list(pool.map(subprocess.Popen.communicate, processes))
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors[-2000:]
        return [json.loads(line) for output, _ in outputs for line in output.splitlines()]

    return run


@pytest.fixture
def wrong() -> Callable[[list[list[Any]]], list[tuple[Any, ...]]]:
    """Errors beyond the tolerance of their dtype in rows ``[case, dtype, {name: error}]``; ``lse`` is float32."""

    def beyond(rows: list[list[Any]]) -> list[tuple[Any, ...]]:
        return [
            (case, dtype, name, error)
            for case, dtype, errors in rows
            for name, error in errors.items()
            if not error <= TOLERANCE["fp32" if name == "lse" else dtype]
        ]

    return beyond


PASSED = "CTXBENCH_PASSED"  # a file of the tests that passed in an earlier run, which are not run again


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = Path(os.environ.get(PASSED, ""))
    passed = set(path.read_text().splitlines()) if path.is_file() else set()
    if passed:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With several workers each report comes twice, and the one in the process that gathers them is later.
    if PASSED in os.environ and report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(os.environ[PASSED]).open("a") as file:
            file.write(f"{report.nodeid}\n")
