"""The memory bank, layer level: fused attention and one re-projected row against all scores and the whole bank."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ctxbench.implementations.memory_bank import METHOD
from ctxbench.implementations.memory_bank.params import MemoryBankParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison
from ctxbench.workload import prepare

IMPLS = ("reference", "blocked", "as_written")


def comparisons() -> list[Comparison]:
    """``blocked`` against ``reference``, the default layer: forward, and forward with backward."""
    found = []
    for mode, length, floor, aim in (("forward", 4096, 1.1, 1.3), ("train", 2048, 1.05, 1.2)):
        dims, params = Dims(seq_len=length), METHOD.params()
        candidates = {
            f"memory_bank/{impl}": prepare(METHOD, dims, params, impl, mode, "fp32").call
            for impl in ("reference", "blocked")
        }
        title = f"memory bank, {mode}, {length} tokens, {params.as_dict()['num_slots']} slots, one layer, fp32"
        name = "memory_bank/blocked"
        found.append(Comparison(title, "memory_bank/reference", candidates, floor={name: floor}, aim={name: aim}))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    params = MemoryBankParams(num_slots=128, segment_len=64)
    dims = Dims(seq_len=256, d_model=64, d_ff=128)
    if impl == "as_written" and mode == "decode":
        pytest.skip("the sketch has no state to decode from")
    work = prepare(METHOD, dims, params, impl, mode, "fp32")
    benchmark.extra_info.update(method="memory_bank", impl=impl, mode=mode, seq_len=256, num_slots=128)
    y = benchmark.pedantic(work.call, rounds=20, warmup_rounds=3)
    assert y.shape == (1, 1 if mode == "decode" else 256, 64)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_write(benchmark: Any, impl: str) -> None:
    """The token that ends a segment, next to a bank of 1024 slots."""
    params = MemoryBankParams(segment_len=8)
    work = prepare(METHOD, Dims(seq_len=7, d_ff=0), params, impl, "decode", "fp32")
    with torch.no_grad():
        step = functools.partial(work.module, work.inputs[0], work.state)
        benchmark.extra_info.update(method="memory_bank", impl=impl, num_slots=1024)
        y, (state,) = benchmark.pedantic(step, rounds=20, warmup_rounds=3)
    assert state.tokens == 8
    assert y.shape == (1, 1, 256)
