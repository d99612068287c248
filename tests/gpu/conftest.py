"""Running the programs beside the tests: what a kernel computes, against float64, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Roundings of independent elements an error is made of, in units of the dtype. fp16: probabilities, their gradient, the
# output and the result. fp32: the exponent multiplies the scores' own rounding by their size, a handful.
TOLERANCE = {"bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11, "fp32": 16 * 2.0**-24}


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a program of this folder with or without Triton's interpreter; its lines of JSON."""

    def run(name: str, *arguments: str, interpret: bool) -> list[Any]:
        pytest.importorskip("triton")
        changes = {"TRITON_INTERPRET": "1" if interpret else "0", "TRITON_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, HERE / name, *arguments], capture_output=True, text=True, check=False,
            env=os.environ | changes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

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
