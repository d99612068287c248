"""Recurrent memory transformer: a whole forward call of one layer, against the public PyTorch package."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch

from ctxbench.implementations.rmt import METHOD
from ctxbench.implementations.rmt.params import RMTParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison
from ctxbench.workload import prepare

PACKAGE = "recurrent_memory_transformer_pytorch"
# Segment, memory, width and heads of the package's own example.
LENGTH, WIDTH, HEADS, PARAMS = 4096, 512, 8, RMTParams(num_memory=128, segment_len=1024, variant="xl")


def package(fused: bool) -> Any:
    """The package at equal work: one layer, one residual stream, no cache of earlier keys, two logits.

    Its network is gated at two thirds of the width, so it multiplies as often as ours; its memory tokens see each
    other as in the variant xl. What it adds cannot be taken out: an embedding, a null key and the two logits.
    ``fused`` is its option for fused attention, which gets a mask.
    """
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    model = RecurrentMemoryTransformer(
        dim=WIDTH, depth=1, num_tokens=2, num_memory_tokens=PARAMS.num_memory, seq_len=PARAMS.segment_len, causal=True,
        dim_head=WIDTH // HEADS, heads=HEADS, use_xl_memories=False, num_residual_streams=1, use_flash_attn=fused,
    )  # fmt: skip
    wrapper = RecurrentMemoryTransformerWrapper(model).eval()
    tokens = torch.randint(0, 2, (1, LENGTH))

    def call() -> Any:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the package chooses kernels through a deprecated name
            return wrapper(tokens)

    return call


def comparisons() -> list[Comparison]:
    """The fast impls against the package where it is installed, and against ``reference``."""
    dims = Dims(seq_len=LENGTH, d_model=WIDTH, num_heads=HEADS, d_ff=4 * WIDTH)
    ours = {
        f"rmt/{impl}": prepare(METHOD, dims, PARAMS, impl, "forward", "fp32").call
        for impl in ("reference", "blocked", "native")
    }
    sizes = f"{LENGTH} tokens, segments of {PARAMS.segment_len} and 2 x {PARAMS.num_memory}, one layer, fp32"
    title = f"recurrent memory transformer, {sizes}"
    found = [Comparison(title, "rmt/reference", ours, floor={"rmt/blocked": 1.1}, aim={"rmt/blocked": 1.3})]
    if importlib.util.find_spec(PACKAGE) is None:
        found[0].title += "; recurrent-memory-transformer-pytorch left out: not installed"
        return found
    candidates = {"package": package(False), "package, fused": package(True), **ours}
    title = f"against recurrent-memory-transformer-pytorch, {sizes}"
    found.append(Comparison(title, "package", candidates, floor={"rmt/native": 1.5}, aim={"rmt/native": 2.5}))
    return found


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims, params = Dims(seq_len=256, d_model=64, d_ff=128), RMTParams(num_memory=4, segment_len=64)
    work = prepare(METHOD, dims, params, impl, mode, "fp32")
    benchmark.extra_info.update(method="rmt", impl=impl, mode=mode, seq_len=256, num_memory=4, segment_len=64)
    y = benchmark.pedantic(work.call, rounds=20, warmup_rounds=3)
    assert y.shape == (1, 1 if mode == "decode" else 256, 64)
