"""Block-Recurrent Transformer: the recurrent layer's attention over a sequence, against the public package.

The package ``block-recurrent-transformer-pytorch`` has one key-value head for all query heads, its states read the
current window and not the one before, and tokens see both windows whole: less projection, half the keys for states,
a wider view. Both have windows of 512 tokens and 512 states.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctxbench.implementations.block_recurrent import METHOD
from ctxbench.implementations.block_recurrent.params import BlockRecurrentParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

D_MODEL, HEADS, WINDOW, STATES = 512, 8, 512, 512
PACKAGES = ("block_recurrent_transformer_pytorch", "einops", "beartype", "packaging")


def layer(impl: str, length: int) -> torch.nn.Module:
    """The attention of one layer, without norm and feed-forward network."""
    dims = Dims(seq_len=length, d_model=D_MODEL, num_heads=HEADS, d_ff=0, position="t5")
    params = BlockRecurrentParams(window=WINDOW, num_states=STATES)
    return METHOD.make(dims, params, impl, "cpu", torch.float32).eval().layers[0].mixer  # type: ignore[no-any-return]


def published() -> Callable[..., Any] | None:
    """The package's layer, window by window, as its transformer calls it; None where it is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.stdout.write(f"left out: the package {', '.join(missing)} is not installed\n")
        return None
    package = importlib.import_module("block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch")
    block = package.AttentionBlock(
        D_MODEL, block_width=WINDOW, dim_head=D_MODEL // HEADS, heads=HEADS, qk_rmsnorm=True, num_state_vectors=STATES
    ).eval()
    rotary = package.RotaryEmbedding(dim=D_MODEL // HEADS, width=2 * WINDOW)
    mask = torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril()

    def call(x: torch.Tensor) -> torch.Tensor:
        angles, scale = rotary()
        outputs, memories, states = [], None, None
        for tokens in x.split(WINDOW, dim=1):
            block.state_container.set_next_read_state(states)
            y, memories, states = block(
                tokens, rotary_pos_emb=angles, xpos_scale=scale, attn_mask=mask, xl_memories=memories
            )
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    return call


def comparisons() -> list[Comparison]:
    """Both impls at two lengths, against the package where it is installed, else against our reference."""
    found = []
    for length in (4096, 8192):
        x = torch.randn(1, length, D_MODEL, generator=torch.Generator().manual_seed(0))
        modules: dict[str, Callable[..., Any]] = {}
        package = published()
        if package is not None:
            modules["block-recurrent-transformer-pytorch"] = package
        modules |= {f"block_recurrent/{impl}": layer(impl, length) for impl in ("reference", "blocked")}
        goals = ["block_recurrent/blocked"] if package is not None else []
        found.append(
            Comparison(
                f"block_recurrent, one layer, {length} tokens, windows of {WINDOW}, {STATES} states, fp32",
                next(iter(modules)), {name: _inference(module, x) for name, module in modules.items()},
                floor=dict.fromkeys(goals, 1.5), aim=dict.fromkeys(goals, 2.5),
            )
        )  # fmt: skip
    return found


def _inference(module: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: module(x))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims, params = Dims(seq_len=500, d_model=64, d_ff=0, position="t5"), BlockRecurrentParams(window=128, num_states=64)
    module = METHOD.make(dims, params, impl, "cpu", torch.float32).eval()
    x = torch.randn(1, 500 if mode == "forward" else 1, 64)
    state = None if mode == "forward" else module.state_at(1, 500)
    benchmark.extra_info.update(method="block_recurrent", impl=impl, mode=mode, seq_len=500, **params.as_dict())
    with torch.no_grad():
        y = benchmark.pedantic(module, (x, state), rounds=5).y
    assert y.shape == x.shape
