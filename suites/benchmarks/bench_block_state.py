"""Block attention with a state: whole layers over several blocks, against dense attention of the same width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctxbench.implementations.block_state import METHOD
from ctxbench.implementations.block_state.params import BlockStateParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

BLOCK = 2048


def _inference(module: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: module(x))


def comparisons() -> list[Comparison]:
    """The reference, both updates, and fused dense attention over the whole sequence in a layer of the same sizes."""
    from ctxbench.registry import discover

    (dense,) = (method for method in discover() if method.name == "dense")
    length = 8192
    dims = Dims(seq_len=length, d_model=512, num_heads=8, d_ff=2048)
    x = torch.randn(1, length, 512, generator=torch.Generator().manual_seed(0))
    modules = {"block_state/reference": METHOD.make(dims, BlockStateParams(), "reference", "cpu", torch.float32)}
    for update in ("mlp", "gru"):
        params = BlockStateParams(update=update)
        modules[f"block_state/blocked {update}"] = METHOD.make(dims, params, "blocked", "cpu", torch.float32)
    modules["dense/blocked, whole sequence"] = dense.make(dims, dense.params(), "blocked", "cpu", torch.float32)
    candidates = {name: _inference(module.eval(), x) for name, module in modules.items()}
    title = f"block_state, one layer, {length} tokens, blocks of {BLOCK}, fp32"
    return [Comparison(title, "block_state/reference", candidates)]


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims, params = Dims(seq_len=500, d_model=64, d_ff=0), BlockStateParams(block_len=128)
    module = METHOD.make(dims, params, impl, "cpu", torch.float32).eval()
    x = torch.randn(1, 500 if mode == "forward" else 1, 64)
    state = None if mode == "forward" else module.state_at(1, 500)
    benchmark.extra_info.update(method="block_state", impl=impl, mode=mode, seq_len=500, **params.as_dict())
    with torch.no_grad():
        y = benchmark.pedantic(module, (x, state), rounds=5).y
    assert y.shape == x.shape
