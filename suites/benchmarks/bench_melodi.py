"""MELODI, layer level: fused windows and one null slot against all scores, and a dense layer."""

from __future__ import annotations

from typing import Any

import pytest

from ctxbench.implementations.dense import METHOD as DENSE
from ctxbench.implementations.melodi import METHOD
from ctxbench.implementations.melodi.params import MelodiParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison
from ctxbench.workload import prepare

IMPLS = ("reference", "blocked")


def comparisons() -> list[Comparison]:
    """``blocked`` against ``reference`` and a dense layer, the default layer: forward, and forward with backward."""
    found = []
    for mode, length, floor in (("forward", 8192, 2.0), ("train", 4096, 1.5)):
        dims = Dims(seq_len=length, position="t5")
        candidates = {
            f"melodi/{impl}": prepare(METHOD, dims, METHOD.params(), impl, mode, "fp32").call for impl in IMPLS
        }
        plain = prepare(DENSE, dims.replace(position="none"), DENSE.params(), "blocked", mode, "fp32")
        candidates["dense layer, SDPA"] = plain.call
        title = f"MELODI, {mode}, {length} tokens, windows of 512, one layer, fp32"
        found.append(Comparison(title, "melodi/reference", candidates, floor={"melodi/blocked": floor}))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    params = MelodiParams(window=64, summary_tokens=8, short_slots=8, long_slots=128, long_per_window=8)
    dims = Dims(seq_len=250, d_model=64, d_ff=128, position="t5")
    work = prepare(METHOD, dims, params, impl, mode, "fp32")
    benchmark.extra_info.update(method="melodi", impl=impl, mode=mode, seq_len=250, long_slots=128)
    y = benchmark.pedantic(work.call, rounds=20, warmup_rounds=3)
    assert y.shape == (1, 1 if mode == "decode" else 250, 64)
