"""Attention over ranges of keys in C++, against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctxbench.implementations._shared.ranges import Line, Range, attend

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [  # queries, keys, channels, heads, position of the first query
    (130, 130, 64, 4, 0),
    (1, 77, 64, 2, 76),
    (257, 300, 40, 2, 43),
    (63, 63, 5, 1, 0),
    (70, 200, 128, 2, 130),
]

Case = Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], tuple[list[Range], Any]]
CASES: dict[str, Case] = {
    "everything": lambda k, v, few: ([Range(k, v)], None),
    "causal": lambda k, v, few: ([Range(k, v, high=Line(base=1))], None),
    "window and a memory": lambda k, v, few: ([Range(k, v, Line(base=-30), Line(base=21)), Range(*few)], None),
    "blocks": lambda k, v, few: ([Range(k, v, Line(32, 32), Line(32, 32, base=32))], None),
    "cells before a block": lambda k, v, few: (
        [Range(*few, high=Line(16)), Range(k, v, Line(32, 32), Line(base=1))],
        None,
    ),
    "known from a row on": lambda k, v, few: (
        [Range(k, v, high=Line(base=1), since=torch.arange(k.shape[2]) * 7 % k.shape[2])],
        None,
    ),
    "bounds that cross": lambda k, v, few: ([Range(k, v, Line(base=5), Line(base=1))], None),
    "slopes": lambda k, v, few: (
        [Range(k, v, high=Line(base=1), start=0), Range(*few)],
        torch.tensor([0.5, 0.1, 0.0, 2.0]),
    ),
    "slopes over cells": lambda k, v, few: (
        [Range(*few, high=Line(16), start=7, every=16), Range(k, v, start=0)],
        torch.tensor([0.5, 0.1, 0.0, 2.0]),
    ),
    "a table": lambda k, v, few: ([Range(k, v, start=0), Range(*few)], torch.linspace(-2, 2, 108).view(4, 27)),
}


def defined(q: torch.Tensor, ranges: list[Range], offset: int, bias: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of all ranges side by side, hidden ones minus infinity, and one softmax."""
    q = q.double()
    H, T, D = q.shape[1:]
    position = torch.arange(T)[:, None] + offset
    scores, values = [], []
    for one in ranges:
        k, v = (x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (one.k, one.v))
        S = k.shape[2]
        key = torch.arange(S)
        found = (q @ k.transpose(2, 3)) * D**-0.5
        low, high = (
            torch.tensor([otherwise if line is None else line.at(int(p)) for p in position])[:, None]
            for line, otherwise in ((one.low, 0), (one.high, S))
        )
        seen = (key >= low) & (key < high)
        if one.since is not None:
            seen &= position >= one.since
        if bias is not None and one.start is not None:
            ahead = one.start + key * one.every - position
            if bias.dim() == 1:
                found = found - bias.double()[:, None, None] * ahead.abs()
            else:
                far = bias.shape[1] // 2
                found = found + bias.double()[:, far + ahead.clamp(-far, far)]
        scores.append(found.masked_fill(~seen, -math.inf))
        values.append(v)
    together = torch.cat(scores, dim=3)
    return together.softmax(dim=3).nan_to_num(0.0) @ torch.cat(values, dim=2), together.logsumexp(dim=3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32", "bf16"])
def test_agrees_with_its_definition(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, heads: int, width: int) -> torch.Tensor:
        return torch.randn(2, tokens, heads, width, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)

    for T, S, D, H, offset in SHAPES:
        q, k, v = draw(T, H, D), draw(S, H, D), draw(S, H, D)
        ranges, bias = CASES[name](k, v, (draw(9, 1, D), draw(9, 1, D)))
        bias = None if bias is None else bias[:H]
        out, lse = attend(q, ranges, offset=offset, bias=bias)
        wanted, wanted_lse = defined(q, ranges, offset, bias)
        assert (out.double() - wanted).abs().max() <= TOLERANCE[dtype], (T, S, D)
        torch.testing.assert_close(lse, wanted_lse.to(lse.dtype), rtol=1e-5, atol=2e-5)
        assert out.dtype == dtype
        assert out.stride() == q.stride()


def test_nan_and_infinity_are_passed_on() -> None:
    q, k, v = (torch.ones(1, 1, 3, 8) for _ in range(3))
    q[0, 0, 1, 0], v[0, 0, 0, 0] = math.nan, math.inf
    out, lse = attend(q, [Range(k, v)])
    assert out[0, 0, 1].isnan().all()
    assert lse.isnan().tolist() == [[[False, True, False]]]
    assert out[0, 0, 0, 0] == math.inf
    assert out[0, 0, 0, 1:].eq(1).all()


def test_says_what_it_does_not_take() -> None:
    half = torch.ones(1, 1, 3, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp64, received torch\.float16"):
        attend(half, [Range(half, half)])
    q = torch.ones(1, 1, 3, 8, requires_grad=True)
    out, _ = attend(q, [Range(q.detach(), q.detach())])
    with pytest.raises(RuntimeError, match="no backward pass"):
        out.sum().backward()
