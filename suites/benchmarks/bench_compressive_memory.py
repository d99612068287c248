"""Compressive memory, layer level: all segments at once against one after the other."""

from __future__ import annotations

from typing import Any

import pytest

from ctxbench.implementations.compressive_memory import METHOD
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison
from ctxbench.workload import prepare

IMPLS = ("reference", "blocked")


def comparisons() -> list[Comparison]:
    """``blocked`` against ``reference``, the default layer: forward, and forward with backward."""
    found = []
    for mode, length, floor, aim in (("forward", 8192, 1.1, 1.3), ("train", 4096, 1.0, 1.2)):
        candidates = {
            f"compressive_memory/{impl}": prepare(
                METHOD, Dims(seq_len=length), METHOD.params(), impl, mode, "fp32"
            ).call
            for impl in IMPLS
        }
        title = f"compressive memory, {mode}, {length} tokens, one layer, fp32"
        name = "compressive_memory/blocked"
        found.append(
            Comparison(title, "compressive_memory/reference", candidates, floor={name: floor}, aim={name: aim})
        )
    return found


@pytest.mark.parametrize("impl", [*IMPLS, "as_written"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    params = CompressiveMemoryParams(segment_len=64, recent_len=64, compressed_len=64, item_len=16)
    if impl == "as_written" and mode == "decode":
        pytest.skip("the sketch has no state to decode from")
    work = prepare(METHOD, Dims(seq_len=512, d_model=64, d_ff=128), params, impl, mode, "fp32")
    benchmark.extra_info.update(method="compressive_memory", impl=impl, mode=mode, seq_len=512, compressed_len=64)
    y = benchmark.pedantic(work.call, rounds=10, warmup_rounds=2)
    assert y.shape == (1, 1 if mode == "decode" else 512, 64)
