"""Attention over ranges of keys in C++, and its gradients, against its definition in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ctxbench.implementations._shared.ranges import Line, Range, attend

WHAT = ("q", "k", "v", "k of few", "v of few", "table")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKWARD_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest, or of 1
SHAPES = [  # queries, keys, channels, heads, position of the first query
    (130, 130, 64, 4, 0),
    (1, 77, 64, 2, 76),
    (257, 300, 40, 2, 43),
    (63, 63, 5, 1, 0),
    (70, 200, 128, 2, 130),
]


def anywhere(keys: int) -> torch.Tensor:
    """Positions ``[2, keys]`` in no order, others in each row of the batch."""
    return (torch.arange(2 * keys).view(2, keys) * 37 % 211 - 60).int()


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
    "slopes from anywhere": lambda k, v, few: (
        [Range(*few, places=anywhere(9)), Range(k, v, high=Line(base=1), start=0)],
        torch.tensor([0.5, 0.1, 0.0, 2.0]),
    ),
    "a table from anywhere": lambda k, v, few: (
        [Range(*few), Range(k, v, high=Line(base=1), places=anywhere(k.shape[2]))],
        torch.linspace(-2, 2, 108).view(4, 27),
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
        if bias is not None and (one.start is not None or one.places is not None):
            places = one.places[:, None] if one.places is not None else (one.start + key * one.every)[None, None]
            ahead = places - position  # [B or 1, T, S]
            if bias.dim() == 1:
                found = found - bias.double()[:, None, None] * ahead[:, None].abs()
            else:
                far = bias.shape[1] // 2
                found = found + bias.double()[:, far + ahead.clamp(-far, far)].transpose(0, 1)
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
    one = half.float()
    with pytest.raises(ValueError, match=r"places are \[B, S\] = \(1, 3\) .* received \(3,\) on cpu"):
        attend(one, [Range(one, one, places=torch.arange(3))])


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """``[B, H, T, D]`` with heads and channels side by side, as projections leave them."""
    made = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return made.transpose(1, 2) if len(shape) == 4 else made


def gradients(
    found: tuple[torch.Tensor, torch.Tensor], grads: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """Of what output and log-sum-exps are worth; those of queries without keys are worth nothing."""
    out, lse = found
    worth = (out.double() * grads[0].double()).sum() + (lse.double() * grads[1])[lse.isfinite()].sum()
    return torch.autograd.grad(worth, leaves, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", BACKWARD_TOLERANCE, ids=["fp64", "fp32", "bf16"])
def test_agrees_with_autograd_of_its_definition(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for T, S, D, H, offset in SHAPES:
        shapes = ((2, T, H, D), (2, S, H, D), (2, S, H, D), (2, 9, 1, D), (2, 9, 1, D))
        q, k, v, *few = leaves = [draw(generator, dtype, *shape).requires_grad_() for shape in shapes]
        ranges, bias = CASES[name](k, v, (few[0], few[1]))
        if bias is not None:
            bias = bias[:H]
            if bias.dim() == 2:
                bias = bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
                leaves.append(bias)
        given = draw(generator, dtype, 2, T, H, D), draw(generator, torch.float64, 2, H, T)
        got = gradients(attend(q, ranges, offset=offset, bias=bias), given, leaves)
        wanted = gradients(defined(q, ranges, offset, bias), given, leaves)
        for what, a, b in zip(WHAT, got, wanted, strict=False):
            assert (a is None) == (b is None), what
            if a is not None and b is not None:
                b = b.double().nan_to_num()  # softmax over no keys: its gradient is NaN, that of no keys 0
                assert (a.double() - b).abs().max() <= BACKWARD_TOLERANCE[dtype] * b.abs().max().clamp(min=1), (
                    what,
                    T,
                    S,
                    D,
                )


def step(threads: int, wanted: tuple[bool, bool]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, few, others = (
        draw(generator, torch.float32, 1, *shape)
        for shape in ((200, 4, 24), (200, 2, 24), (200, 2, 24), (70, 1, 24), (70, 1, 24))
    )
    leaves = [x.requires_grad_() for x, want in ((q, True), (k, wanted[0]), (v, wanted[0]), (few, wanted[1])) if want]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = attend(q, [Range(k, v, Line(base=-40), Line(base=1)), Range(few, others)])
        return list(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    finally:
        torch.set_num_threads(before)


def test_threads_change_nothing() -> None:
    one = step(1, (True, True))
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, step(threads, (True, True)), strict=True))


def test_what_nobody_wants_changes_nothing() -> None:
    q, k, v, few = step(1, (True, True))
    assert torch.equal(step(1, (False, False))[0], q)
    assert all(torch.equal(a, b) for a, b in zip(step(1, (True, False)), (q, k, v), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(step(1, (False, True)), (q, few), strict=True))
