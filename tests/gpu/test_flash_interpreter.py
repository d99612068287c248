"""The flash kernels compute what the definition says: in Triton's interpreter on any machine, and on a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.flash_table import UNBOUNDED, visible_pairs
from ctxbench.implementations.dense import METHOD
from ctxbench.method import Dims

PROGRAM = Path(__file__).with_name("flash_parity.py")
# Roundings of independent elements an error is made of, in units of the dtype. fp16: probabilities, their gradient, the
# output and the result. fp32: the exponent multiplies the scores' own rounding by their size, a handful.
TOLERANCE = {"bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11, "fp32": 16 * 2.0**-24}


def wrong(rows: list[list]) -> list[tuple]:
    """Errors beyond the tolerance of their dtype; the log-sum-exp stays in float32."""
    return [
        (case, dtype, name, error)
        for case, dtype, errors in rows
        for name, error in errors.items()
        if not error <= TOLERANCE["fp32" if name == "lse" else dtype]
    ]


def measure(interpret: str) -> list[list]:
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_forward_and_backward_agree_with_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    rows = measure("1")
    assert len(rows) == 20
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_forward_and_backward_agree_with_float64_on_the_device() -> None:
    pytest.importorskip("triton")
    rows = measure("0")
    assert {dtype for _case, dtype, _errors in rows} == {"bf16", "fp16", "fp32"}
    assert not wrong(rows)


@pytest.mark.parametrize(
    ("mode", "causal"), [("forward", True), ("forward", False), ("train", True), ("train", False), ("stream", True)]
)
def test_formulas_of_dense_are_what_the_tracer_counts(mode: str, causal: bool) -> None:
    pytest.importorskip("triton")
    params, dims = METHOD.params(), Dims(seq_len=1301, num_layers=2, batch_size=2, causal=causal)
    counted = trace(METHOD, dims, params, "triton", mode, "fp32")
    cost = METHOD.cost_of("triton", mode, causal, "none", params)
    values = bindings(dims, params, 4, METHOD.segment_len(params))
    assert evaluate(total(cost.flops), values) == counted.flops
    assert evaluate(cost.peak_bytes, values) == counted.peak_bytes
    assert not counted.uncounted


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (5, 12), (12, 5)])
@pytest.mark.parametrize("left", [UNBOUNDED, 0, 3, 20])
@pytest.mark.parametrize("right", [UNBOUNDED, 0, 2, 20])
def test_visible_pairs_are_counted_one_by_one(queries: int, keys: int, left: int, right: int) -> None:
    seen = [
        (left == UNBOUNDED or key >= position - left) and (right == UNBOUNDED or key <= position + right)
        for position in range(keys - queries, keys)
        for key in range(keys)
    ]
    assert visible_pairs(queries, keys, left, right) == sum(seen)


@pytest.mark.parametrize(
    ("width", "device", "dtype", "reason"),
    [
        (64, "cpu", "bf16", "runs on cuda"),
        (64, "cuda", "fp64", "compute in fp32, bf16, fp16"),
        (256, "cuda", "bf16", "at most 128 channels"),
        (128, "cuda", "fp32", "at most 64 channels"),
        (128, "cuda", "bf16", ""),
    ],
)
def test_support_says_why_not(monkeypatch, width: int, device: str, dtype: str, reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    dims = Dims(seq_len=64, d_model=2 * width, num_heads=2)
    answer = METHOD.impl_support(METHOD.impl("triton"), "forward", dims, METHOD.params(), device, dtype)
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
