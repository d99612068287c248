"""Shared terms against brute force: every pair is counted one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sympy import Integer

from ctxbench.cost import evaluate
from ctxbench.cost.symbols import B, d, e, f
from ctxbench.cost.terms import (
    attention,
    band_pairs,
    causal_pairs,
    ffn,
    largest,
    linear,
    linear_parameters,
    projections,
    tensor,
    triangle,
    when_ffn,
    window_pairs,
)

TOKENS = st.integers(1, 60)
SPAN = st.integers(0, 80)


def pairs(tokens: int, sees) -> int:
    return sum(bool(sees(i, j)) for i in range(tokens) for j in range(tokens))


@given(TOKENS)
def test_triangle(n: int) -> None:
    assert evaluate(triangle(n), {}) == pairs(n, lambda i, j: j <= i)


@given(TOKENS, SPAN)
def test_causal_pairs_with_earlier_keys(queries: int, offset: int) -> None:
    seen = sum(1 for i in range(queries) for j in range(offset + queries) if j <= offset + i)
    assert evaluate(causal_pairs(queries, offset), {}) == seen


@given(TOKENS, st.integers(1, 80))
def test_window_pairs(tokens: int, window: int) -> None:
    assert evaluate(window_pairs(tokens, window), {}) == pairs(tokens, lambda i, j: i - window < j <= i)


@given(TOKENS, SPAN, SPAN)
def test_band_pairs(tokens: int, left: int, right: int) -> None:
    assert evaluate(band_pairs(tokens, left, right), {}) == pairs(tokens, lambda i, j: i - left <= j <= i + right)


@given(TOKENS, st.integers(1, 80))
def test_a_window_is_a_one_sided_band(tokens: int, window: int) -> None:
    assert evaluate(window_pairs(tokens, window), {}) == evaluate(band_pairs(tokens, window - 1, 0), {})


def test_flops_of_the_parts() -> None:
    values = {"B": 3, "d": 8, "f": 20, "e": 2}
    assert evaluate(linear(5, 7, 11), values) == 2 * 5 * 7 * 11
    assert evaluate(attention(10), values) == 4 * 3 * 8 * 10
    assert evaluate(projections(5), values) == 2 * 3 * 5 * 8 * 32
    assert evaluate(ffn(5), values) == 2 * (2 * 3 * 5 * 8 * 20)
    assert evaluate(linear_parameters(d, f), values) == 8 * 20 + 20
    assert evaluate(linear_parameters(d, f, bias=False), values) == 8 * 20
    assert evaluate(tensor(B, d), values) == 2 * 3 * 8


@pytest.mark.parametrize(("width", "value"), [(0, 0), (20, 8)])
def test_a_term_of_the_ffn_vanishes_without_one(width: int, value: int) -> None:
    assert evaluate(when_ffn(d), {"d": 8, "f": width}) == value
    assert e.is_positive
    assert Integer(0) == evaluate(ffn(5), {"B": 1, "d": 8, "f": 0})


@given(st.lists(st.integers(-5, 50), min_size=1, max_size=4))
def test_largest_is_the_maximum(parts: list[int]) -> None:
    assert evaluate(largest(*parts), {}) == max(parts)
    assert evaluate(largest(B, *parts) + 1, {"B": 7}) == max(7, *parts) + 1
