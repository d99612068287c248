"""Dense attention, operator level: q, k, v in, output out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.dense import blocked, reference, slabs
from ctxbench.implementations.dense import triton as native
from ctxbench.suites.benchmarks.bench_peak import products
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH = 4, 64
FEWEST_FLOPS = 2e10
SHAPES = ((4, 64, 512), (1, 64, 1024), (4, 64, 1024), (16, 64, 1024), (4, 128, 1024), (4, 64, 2048), (4, 64, 8192))
IMPLS = {
    "reference": reference.attend, "blocked": blocked.attend, "slabs": slabs.attend, "native": native.attend,
}  # fmt: skip


def operands(queries: int, keys: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys or queries, keys or queries)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator) for length in lengths]


def comparisons() -> list[Comparison]:
    """The fast impls against the fused call that a user would write."""
    found = []
    for title, queries, keys in (("whole sequence", 4096, 4096), ("decode", 1, 16384)):
        q, k, v = operands(queries, keys)
        candidates = {
            "plain SDPA": functools.partial(scaled_dot_product_attention, q, k, v, is_causal=queries > 1),
            "dense/blocked": functools.partial(blocked.attend, q, k, v, True, Position()),
        }
        name = f"dense attention, {title}, {queries} queries, {keys} keys, fp32"
        found.append(Comparison(name, "plain SDPA", candidates, floor={"dense/blocked": 0.97}))
    q, k, v = operands(512, 8192)
    visible = torch.ones(512, 8192, dtype=torch.bool).tril(8192 - 512)
    candidates = {
        "plain SDPA, mask ready": functools.partial(scaled_dot_product_attention, q, k, v, attn_mask=visible),
        "dense/blocked": functools.partial(blocked.attend, q, k, v, True, Position()),
    }
    title = "dense attention, streamed call, 512 queries, 8192 keys, fp32"
    found.append(Comparison(title, "plain SDPA, mask ready", candidates, floor={"dense/blocked": 0.95}))
    for causal in (False, True):
        q, k, v = (x.bfloat16() for x in operands(8192))
        candidates = {
            "plain SDPA": functools.partial(scaled_dot_product_attention, q, k, v, is_causal=causal),
            "dense/slabs": functools.partial(slabs.attend, q, k, v, causal, Position()),
            "dense/native": functools.partial(native.attend, q, k, v, causal, Position()),
        }
        title = f"dense attention, {'causal' if causal else 'bidirectional'}, 8192 tokens, bf16"
        found.append(
            Comparison(title, "plain SDPA", candidates, floor={"dense/native": 1.3}, aim={"dense/native": 2.0})
        )
    return found + [fast(*shape) for shape in SHAPES]


def fast(heads: int, width: int, tokens: int) -> Comparison:
    """``native`` against the fused call, and beside it matrix products of as many FLOPs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, width, generator=generator).transpose(1, 2) for _ in range(3))
    flops = 2 * heads * width * tokens * (tokens + 1)
    calls = max(1, round(FEWEST_FLOPS / flops))  # so that calls take long enough to tell apart

    def repeated(attend: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                attend()

        return run

    candidates = {
        "plain SDPA": repeated(functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)),
        "dense/native": repeated(functools.partial(native.attend, q, k, v, True, Position())),
        "matrix products of equal FLOPs": products(calls * flops, torch.float32),
    }
    title = f"dense attention, causal, {heads} heads of {width}, {tokens} tokens, fp32"
    return Comparison(
        title, "plain SDPA", candidates, floor={"dense/native": 1.05}, aim={"dense/native": 1.35}
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 256], ids=["decode", "chunk"])
def test_attend(benchmark: Any, impl: str, queries: int) -> None:
    q, k, v = operands(queries, 512)
    benchmark.extra_info.update(method="dense", impl=impl, queries=queries, keys=512)
    y = benchmark.pedantic(IMPLS[impl], (q, k, v, True, Position()), rounds=20, warmup_rounds=3)
    assert y.shape == q.shape
