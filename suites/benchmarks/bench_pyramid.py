"""Pyramid operators: the fusion alone in both forms, and a whole forward call of every impl."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxbench.implementations.pyramid import METHOD
from ctxbench.implementations.pyramid.blocked import OPERATORS as BLOCKED
from ctxbench.implementations.pyramid.reference import OPERATORS as REFERENCE
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

DIMS = Dims(seq_len=512, d_model=64, num_heads=4, num_layers=3, d_ff=256)


def levels(length: int, d_model: int) -> tuple[Any, ...]:
    """Arguments of a causal fusion of three levels from the first token on."""
    fine = torch.randn(1, length, d_model)
    coarse = [torch.randn(1, length // 2**level + 1, d_model // 2**level) for level in (1, 2)]
    return fine, coarse, 0, 2, True, torch.randn(d_model, 3 * d_model // 4), torch.randn(d_model)


def comparisons() -> list[Comparison]:
    """Project before repeating against repeating before projecting, at 8k tokens."""
    arguments = levels(8192, 256)
    candidates = {
        "repeat, then project": lambda: REFERENCE.fuse(*arguments),
        "project, then repeat": lambda: BLOCKED.fuse(*arguments),
    }
    return [Comparison("pyramid: fusion of 3 levels, 8k tokens, d = 256, fp32", "repeat, then project", candidates)]


@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
def test_fusion(benchmark: Any, operators: Any) -> None:
    benchmark(operators.fuse, *levels(DIMS.seq_len, DIMS.d_model))


@pytest.mark.parametrize("impl", [impl.name for impl in METHOD.impls])
def test_forward(benchmark: Any, impl: str) -> None:
    module = METHOD.make(DIMS, METHOD.params(), impl, "cpu", torch.float32).eval()
    x = torch.randn(1, DIMS.seq_len, DIMS.d_model)
    benchmark.extra_info["cell"] = f"pyramid/{impl} T={DIMS.seq_len} d_model={DIMS.d_model} layers={DIMS.num_layers}"
    with torch.no_grad():
        benchmark(module, x)
