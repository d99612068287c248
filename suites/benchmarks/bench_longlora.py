"""Shifted sparse attention, operator level: q, k, v in, output out, against dense attention and against rolling."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.longlora import blocked, reference
from ctxbench.implementations.longlora import triton as native
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH, PLAIN = 4, 64, Position()
IMPLS = {"reference": reference.attend, "blocked": blocked.attend, "native": native.attend}


def operands(tokens: int) -> list[torch.Tensor]:
    """Heads inside of tokens, as projections hand them over."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, HEADS, WIDTH, generator=generator).transpose(1, 2) for _ in range(3)]


def rolled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int) -> torch.Tensor:
    """What a user would write: roll half of the heads, stack groups, one fused causal call, roll back (wraps)."""

    def shift(x: torch.Tensor, by: int) -> torch.Tensor:
        return torch.cat((x[:, : HEADS // 2], x[:, HEADS // 2 :].roll(by, dims=2)), dim=1)

    q_g, k_g, v_g = (shift(x, -group // 2).unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    mixed = scaled_dot_product_attention(q_g, k_g, v_g, is_causal=True)
    return shift(mixed.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3), group // 2)


def comparisons() -> list[Comparison]:
    """``blocked`` and ``native`` against dense attention, rolling and ``reference``."""
    found = []
    for tokens, group, floor in ((4096, 1024, 2.5), (8192, 512, 5.0)):
        q, k, v = operands(tokens)
        candidates = {
            "plain SDPA": functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True),
            "longlora/reference": functools.partial(reference.attend, q, k, v, group, False, PLAIN),
            "roll and SDPA": functools.partial(rolled, q, k, v, group),
            "longlora/blocked": functools.partial(blocked.attend, q, k, v, group, False, PLAIN),
            "longlora/native": functools.partial(native.attend, q, k, v, group, False, PLAIN),
        }
        title = f"shifted sparse attention, {tokens} tokens, groups of {group}, fp32"
        found.append(Comparison(title, "plain SDPA", candidates, floor={"longlora/blocked": floor}))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wrap", [False, True], ids=["open", "wrapped"])
def test_attend(benchmark: Any, impl: str, wrap: bool) -> None:
    q, k, v = operands(512)
    benchmark.extra_info.update(method="longlora", impl=impl, seq_len=512, group=128, wrap=wrap)
    y = benchmark.pedantic(IMPLS[impl], (q, k, v, 128, wrap, PLAIN), rounds=20, warmup_rounds=3)
    assert y.shape == q.shape
    if wrap:
        torch.testing.assert_close(y, rolled(q, k, v, 128), rtol=0, atol=1e-5)
