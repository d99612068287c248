"""Dense attention, operator level: q, k, v in, output out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared import products as plain
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.dense import blocked, reference, slabs
from ctxbench.suites.benchmarks.bench_peak import products
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH = 4, 64
FEWEST_FLOPS = 2e10
ROOM = ((4, 64, 512), (1, 64, 1024), (4, 64, 1024), (16, 64, 1024), (4, 128, 1024), (4, 64, 2048), (4, 64, 8192))
IMPLS = {"reference": reference.attend, "blocked": blocked.attend, "slabs": slabs.attend}


def operands(queries: int, keys: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys or queries, keys or queries)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator) for length in lengths]


def comparisons() -> list[Comparison]:
    """``blocked`` against the fused call that a user would write."""
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
        }
        title = f"dense attention, {'causal' if causal else 'bidirectional'}, 8192 tokens, bf16"
        found.append(Comparison(title, "plain SDPA", candidates, floor={"dense/slabs": 1.3}, aim={"dense/slabs": 2.0}))
    return found + [room(*shape) for shape in ROOM]


def room(heads: int, width: int, tokens: int) -> Comparison:
    """What a causal path in fp32 could gain on the fused kernel, and what plain products and splits gain; no floor.

    The kernel multiplies tiles of 512 keys to their ends: 1.5 times the visible pairs at 1k tokens, 1.06 at 8k. A split
    skips some of those, but the kernel works off 256 queries at a time only in calls of 768 or more, else 64 or, below
    192, 32, and then reads keys and values as many times more often: it loses what it skipped. Plain products by slabs
    of 64, 128 or 256 queries with 2^17 to 2^21 scores at a time take as long as the kernel at 512 tokens (0.98 of its
    speed at best), and lose at 1k (0.54 with 1 head, 0.78 with 4, 0.90 with 16, 0.84 with heads of 128) and 2k (0.77).
    """
    q, k, v = (torch.randn(1, heads, tokens, width) for _ in range(3))
    baseline, flops = "matrix products of equal FLOPs", 2 * heads * width * tokens * (tokens + 1)
    calls = max(1, round(FEWEST_FLOPS / flops))  # so that calls take long enough to tell apart

    def repeated(attend: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                attend()

        return run

    candidates = {
        baseline: products(calls * flops, torch.float32),
        "plain SDPA": repeated(functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True)),
        "plain products": repeated(functools.partial(plain.attend, q, k, v)),
        "fused halves, merged": repeated(functools.partial(split, q, k, v, 2)),
        "fused quarters, merged": repeated(functools.partial(split, q, k, v, 4)),
    }
    title = f"dense attention, causal, {heads} heads of {width}, {tokens} tokens, fp32: fraction of matmul"
    return Comparison(title, baseline, candidates)


def split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: int) -> torch.Tensor:
    """Causal attention, each part's triangle and the rectangle before it apart, merged by their log-sum-exps."""
    fused, rows, outputs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q.shape[2] // parts, []
    for begin in range(0, q.shape[2], rows):
        own, before = slice(begin, begin + rows), slice(begin)
        triangle, its_sums = fused(q[:, :, own], k[:, :, own], v[:, :, own], is_causal=True)
        if begin:
            rectangle, sums = fused(q[:, :, own], k[:, :, before], v[:, :, before])
            triangle = torch.lerp(rectangle, triangle, torch.sigmoid(its_sums - sums)[..., None])
        outputs.append(triangle)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 256], ids=["decode", "chunk"])
def test_attend(benchmark: Any, impl: str, queries: int) -> None:
    q, k, v = operands(queries, 512)
    benchmark.extra_info.update(method="dense", impl=impl, queries=queries, keys=512)
    y = benchmark.pedantic(IMPLS[impl], (q, k, v, True, Position()), rounds=20, warmup_rounds=3)
    assert y.shape == q.shape
