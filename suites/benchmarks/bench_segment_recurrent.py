"""Segment-recurrent transformer: fused attention, and the diagonal schedule, against the loop with all scores."""

from __future__ import annotations

from typing import Any

import pytest

from ctxbench.implementations.segment_recurrent import METHOD
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison
from ctxbench.workload import prepare


def comparisons() -> list[Comparison]:
    """Default segments, in which a cell fills a core, and short ones, which the diagonal is made for."""
    found = []
    for segment, memory, floor, aim in ((512, 256, 1.05, 1.2), (32, 16, 0.9, 1.1)):
        dims = Dims(seq_len=4096 if segment == 512 else 1024, num_layers=4)
        params = SegmentRecurrentParams(memory_len=memory, segment_len=segment)
        candidates = {
            f"segment_recurrent/{impl}": prepare(METHOD, dims, params, impl, "forward", "fp32").call
            for impl in ("reference", "blocked", "diagonal")
        }
        found.append(
            Comparison(
                f"segment_recurrent, {dims.seq_len} tokens, segments of {segment}, memory {memory}, 4 layers, fp32",
                "segment_recurrent/reference", candidates,
                floor={"segment_recurrent/blocked": floor}, aim={"segment_recurrent/blocked": aim},
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("impl", ["reference", "blocked", "diagonal", "as_written"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    if impl == "as_written" and mode == "decode":
        pytest.skip("the sketch would take a token for a segment")
    dims = Dims(seq_len=256, d_model=64, d_ff=128, num_layers=2)
    params = SegmentRecurrentParams(memory_len=32, segment_len=64)
    work = prepare(METHOD, dims, params, impl, mode, "fp32")
    benchmark.extra_info.update(method="segment_recurrent", impl=impl, mode=mode, seq_len=256, memory_len=32)
    y = benchmark.pedantic(work.call, rounds=20, warmup_rounds=3)
    assert y.shape == (1, 1 if mode == "decode" else 256, 64)
