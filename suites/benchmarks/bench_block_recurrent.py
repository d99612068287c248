"""Block-Recurrent Transformer, against the public package ``block-recurrent-transformer-pytorch``.

Operator level, equal work: unit queries and keys, then all four attentions of every window, from projected rows to
mixed ones. The package's ``Attention`` gets the heads as a batch, since it has one key-value head for all query heads,
a band as mask, and the keys of two windows for the states.

Layer level, unequal work: the package's layer as its transformer calls it. It projects one key-value head, and its
states read one window; most of both is the same matrix products.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from ctxbench.implementations._shared.biased_window import Compact
from ctxbench.implementations.block_recurrent import METHOD, blocked, reference, triton
from ctxbench.implementations.block_recurrent.params import BlockRecurrentParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

D_MODEL, HEADS, WINDOW, STATES = 512, 8, 512, 512
PACKAGES = ("block_recurrent_transformer_pytorch", "einops", "beartype", "packaging")
# native runs the operators of triton: on CPUs their kernels are C++
IMPLS = {"reference": reference.OPERATORS, "blocked": blocked.OPERATORS, "native": triton.OPERATORS}


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


def operands(length: int) -> dict[str, torch.Tensor]:
    """Projected rows ``[H, T or R, D]``; those of the states serve every window."""
    generator = torch.Generator().manual_seed(0)
    tokens, states = ("q", "k", "v", "read_q"), ("state_k", "state_v", "state_q", "write_q")
    sizes = dict.fromkeys(tokens, length) | dict.fromkeys(states, STATES)
    width = D_MODEL // HEADS
    return {name: torch.randn(HEADS, rows, width, generator=generator) for name, rows in sizes.items()}


def ours(operands: dict[str, torch.Tensor], impl: tuple[Any, Any]) -> torch.Tensor:
    """All four attentions over the sequence, ``[1, H, rows, D]`` joined by rows."""
    local, attend = impl
    rows = {name: a[None] for name, a in operands.items()}
    scale, bias = (D_MODEL // HEADS) ** 0.5, torch.zeros(HEADS, WINDOW)
    unit = {name: a if name in ("v", "state_v") else normalize(a, dim=3) for name, a in rows.items()}
    unit |= {name: unit[name] * scale for name in ("q", "read_q", "state_q", "write_q")}
    compact = Compact(WINDOW, torch.zeros(HEADS, 2 * WINDOW + 1))  # both directions
    outputs = [local(unit["q"], unit["k"], unit["v"], compact if getattr(local, "compact", False) else bias)]
    for first in range(0, outputs[0].shape[2], WINDOW):
        keys = slice(max(first - WINDOW, 0), first + WINDOW)
        outputs.append(attend(unit["read_q"][:, :, first : first + WINDOW], unit["state_k"], unit["state_v"]))
        outputs.append(attend(unit["state_q"], unit["state_k"], unit["state_v"]))
        outputs.append(attend(unit["write_q"], unit["k"][:, :, keys], unit["v"][:, :, keys]))
    return torch.cat(outputs, dim=2)


def theirs(rows: dict[str, torch.Tensor], attention: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The same by the package's module, window by window."""
    local, others = [], []
    for first in range(0, rows["q"].shape[1], WINDOW):
        own, keys = slice(first, first + WINDOW), slice(max(first - WINDOW, 0), first + WINDOW)
        K = keys.stop - keys.start
        distance = torch.arange(K - WINDOW, K)[:, None] - torch.arange(K)
        band = (distance >= 0) & (distance < WINDOW)
        local.append(attention(rows["q"][:, None, own], rows["k"][:, keys], rows["v"][:, keys], mask=band))
        for name, pair in (("read_q", slice(None)), ("state_q", slice(None)), ("write_q", keys)):
            k, v = (rows["k"], rows["v"]) if name == "write_q" else (rows["state_k"], rows["state_v"])
            query = rows[name][:, None, own] if name == "read_q" else rows[name][:, None]
            others.append(attention(query, k[:, pair], v[:, pair]))
    return torch.cat(local + others, dim=2).transpose(0, 1)


def published_attention() -> Callable[..., torch.Tensor] | None:
    """The package's attention with the scale that ours begins with; None where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        return None
    package = importlib.import_module("block_recurrent_transformer_pytorch.block_recurrent_transformer_pytorch")
    attention = package.Attention(D_MODEL // HEADS, qk_rmsnorm=True).eval()
    with torch.no_grad():
        attention.q_scale.fill_(D_MODEL // HEADS)  # it multiplies by D^-1/2 once more
    return attention  # type: ignore[no-any-return]


def comparisons() -> list[Comparison]:
    """Operator and layer at two lengths, against the package where it is installed, else against our reference."""
    found = []
    for length in (4096, 8192):
        x = torch.randn(1, length, D_MODEL, generator=torch.Generator().manual_seed(0))
        rows = operands(length)
        package, attention = published(), published_attention()
        operators: dict[str, Callable[[], Any]] = {}
        modules: dict[str, Callable[[], Any]] = {}
        if package is not None and attention is not None:
            operators["package's Attention"] = torch.no_grad()(functools.partial(theirs, rows, attention))
            modules["package's AttentionBlock"] = _inference(package, x)
        for name, impl in IMPLS.items():
            operators[f"block_recurrent/{name}"] = torch.no_grad()(functools.partial(ours, rows, impl))
            modules[f"block_recurrent/{name}"] = _inference(layer(name, length), x)
        goals = [] if package is None else ["block_recurrent/blocked", "block_recurrent/native"]
        sizes = f"{length} tokens, windows of {WINDOW}, {STATES} states, fp32"
        found.append(
            Comparison(
                f"block_recurrent, operator, equal work, {sizes}", next(iter(operators)), operators,
                floor=dict.fromkeys(goals, 1.5), aim=dict.fromkeys(goals, 2.5),
            )
        )  # fmt: skip
        found.append(Comparison(f"block_recurrent, layer, {sizes}", next(iter(modules)), modules))
    return found


def _inference(module: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: module(x))


def test_operators_compute_the_same(benchmark: Any) -> None:
    rows = operands(2 * WINDOW)
    expected = benchmark.pedantic(ours, (rows, reference.OPERATORS), rounds=1)
    for operators in (blocked.OPERATORS, triton.OPERATORS):
        torch.testing.assert_close(ours(rows, operators), expected, rtol=1e-4, atol=1e-4)
    attention = published_attention()
    if attention is not None:
        torch.testing.assert_close(theirs(rows, attention), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("impl", "mode"), [*itertools.product(("reference", "blocked"), ("forward", "decode")), ("native", "forward")]
)
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims, params = Dims(seq_len=500, d_model=64, d_ff=0, position="t5"), BlockRecurrentParams(window=128, num_states=64)
    module = METHOD.make(dims, params, impl, "cpu", torch.float32).eval()
    x = torch.randn(1, 500 if mode == "forward" else 1, 64)
    state = None if mode == "forward" else module.state_at(1, 500)
    benchmark.extra_info.update(method="block_recurrent", impl=impl, mode=mode, seq_len=500, **params.as_dict())
    with torch.no_grad():
        y = benchmark.pedantic(module, (x, state), rounds=5).y
    assert y.shape == x.shape
