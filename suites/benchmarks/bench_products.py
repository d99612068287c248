"""Attention by plain products in bf16 on CPU, operator level, against the fused kernel on the same operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctxbench.implementations._shared import fused, products
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH = 8, 64
SHAPES = {  # rows of the batch, queries, keys, causal; the least ratio forward, and forward with backward
    "a segment": (8, 512, 512, True, 1.5, 1.5),
    "a segment after what it retrieved": (8, 512, 832, True, 1.4, 1.4),
    "a block of 2k": (1, 2048, 2048, True, 1.1, 1.0),
    "a bank": (4, 512, 1024, False, 1.2, 1.2),
}
OPERATORS = {"fused": fused.attend, "products": products.attend}


def operands(rows: int, queries: int, keys: int) -> list[torch.Tensor]:
    """``q, k, v: [B, H, t, D]`` with heads inside, as projections leave them."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(rows, n, HEADS, WIDTH, generator=generator) for n in (queries, keys, keys))
    return [x.bfloat16().transpose(1, 2) for x in drawn]


def trained(operator: Callable[..., torch.Tensor], inputs: list[torch.Tensor], causal: bool) -> None:
    """Forward and backward with gradients of all operands."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = operator(*leaves, causal)
        out.backward(out.detach())


def comparisons() -> list[Comparison]:
    """Forward, and forward with backward."""
    found = []
    for title, (rows, queries, keys, causal, *floors) in SHAPES.items():
        inputs = operands(rows, queries, keys)
        for mode, floor in zip(("forward", "train"), floors, strict=True):
            calls: dict[str, Callable[[], Any]] = {
                name: functools.partial(trained, operator, inputs, causal)
                if mode == "train"
                else functools.partial(operator, inputs[0], inputs[1], inputs[2], causal)
                for name, operator in OPERATORS.items()
            }
            name = f"{title}, {mode}, {rows} x {queries} queries, {keys} keys, bf16"
            found.append(Comparison(name, "fused", calls, floor={"products": floor}, aim={"products": 1.8}))
    return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_attend(benchmark: Any, operator: str) -> None:
    inputs = operands(1, 256, 320)
    benchmark.extra_info.update(operator=operator, queries=256, keys=320)
    out = benchmark.pedantic(OPERATORS[operator], (*inputs, True), rounds=10, warmup_rounds=2)
    assert out.shape == inputs[0].shape
