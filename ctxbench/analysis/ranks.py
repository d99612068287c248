"""Comparing two small groups by ranks: the exact test, the shift with its interval, and many tests at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Shift(NamedTuple):
    """Ratio of two groups with its interval; ``confidence`` is what the sizes admit, 0 with one value a side."""

    ratio: float
    low: float
    high: float
    confidence: float


@lru_cache(maxsize=256)
def u_distribution(m: int, n: int) -> np.ndarray:
    """Probability of each value 0..mn of the Mann-Whitney U when both groups come from one distribution.

    The counts are the coefficients of the Gaussian binomial, prod (1 - x^(m+i)) / (1 - x^i) for i = 1..n, as floats:
    exact up to 2^53.
    """
    counts = np.zeros(m * n + 1)
    counts[0] = 1.0
    for i in range(1, n + 1):
        if m + i <= m * n:
            counts[m + i :] -= counts[: -(m + i)].copy()
        for u in range(i, len(counts)):
            counts[u] += counts[u - i]
    return counts / counts.sum()


def smallest_p(m: int, n: int) -> float:
    """The smallest two-sided p two groups of these sizes can reach, when they do not overlap at all."""
    return min(1.0, 2 / math.comb(m + n, m)) if m and n else 1.0


def rank_test(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p of the Mann-Whitney test; ties are resolved against a difference."""
    if not len(a) or not len(b):
        return 1.0
    difference = b[:, None] - a[None, :]
    above, below = int((difference > 0).sum()), int((difference < 0).sum())
    centre = len(a) * len(b) // 2
    u = min(min(above, below) + int((difference == 0).sum()), centre)
    return min(1.0, 2 * float(u_distribution(len(a), len(b))[: u + 1].sum()))


def hodges_lehmann(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> Shift:
    """The ratio ``b / a``: the median of all pairwise ratios, with the interval that inverts the exact test.

    The interval has at least ``confidence`` where the sizes admit it, else the most they admit: three against three
    values reach 90 %.
    """
    if not len(a) or not len(b):
        return Shift(math.nan, math.nan, math.nan, 0.0)
    ratios = np.sort(np.log(b)[:, None] - np.log(a)[None, :], axis=None)
    cut, reached = _cut(len(a), len(b), confidence)
    low, high = np.exp(ratios[cut]), np.exp(ratios[len(ratios) - 1 - cut])
    if len(ratios) == 1:
        low = high = math.nan
    return Shift(float(np.exp(np.median(ratios))), float(low), float(high), reached)


def _cut(m: int, n: int, confidence: float) -> tuple[int, float]:
    """How many of the sorted pairs lie outside the interval on either side, and the confidence that this gives."""
    tail = np.cumsum(u_distribution(m, n))
    cut = max(int(np.searchsorted(tail, (1 - confidence) / 2, side="right")) - 1, 0)
    return cut, max(0.0, 1 - 2 * float(tail[cut]))


class Adjusted(NamedTuple):
    """Two groups with what a covariate explains taken out: exact p, ratio, the groups, and the coefficient."""

    p: float
    shift: Shift
    a: np.ndarray
    b: np.ndarray
    coefficient: float


def adjusted(
    a: np.ndarray, b: np.ndarray, x_a: np.ndarray, x_b: np.ndarray, confidence: float = 0.95
) -> Adjusted:  # fmt: skip
    """The rank test and its ratio after a regression of ``log`` on a covariate.

    The coefficient comes from all values at once, blind to their group: where the groups are exchangeable so are the
    residuals, and the test stays exact. Where the covariate differs between the groups it takes its part of their
    difference along, which costs power and never invents a difference. The interval inverts this very test: with B
    divided by a ratio, the coefficient changes linearly in the logarithm of the ratio, so each pair of values changes
    sign at one ratio. A pair that does not (the covariate parts the groups) stands for no bound.
    """
    y, x = np.log(np.concatenate([a, b])), np.concatenate([x_a, x_b])
    label = np.concatenate([np.zeros(len(a)), np.ones(len(b))])
    centred = x - x.mean()
    squares = float(centred @ centred)
    slope, lean = (float(centred @ y) / squares, float(centred @ label) / squares) if squares > 1e-12 else (0.0, 0.0)
    residual = np.exp(y - slope * centred)
    one, other = residual[: len(a)], residual[len(a) :]
    p = rank_test(one, other)
    apart = x_b[:, None] - x_a[None, :]
    reach = 1 - lean * apart
    turn = np.divide(
        np.log(other)[:, None] - np.log(one)[None, :], reach, where=reach > 0, out=np.full_like(reach, np.nan)
    )
    known = turn[~np.isnan(turn)]
    if not len(known):
        return Adjusted(p, Shift(math.nan, math.nan, math.nan, 0.0), one, other, slope)
    cut, reached = _cut(len(a), len(b), confidence)
    low = np.sort(np.nan_to_num(turn, nan=-np.inf), axis=None)[cut]
    high = np.sort(np.nan_to_num(turn, nan=np.inf), axis=None)[turn.size - 1 - cut]
    shift = Shift(float(np.exp(np.median(known))), float(np.exp(low)), float(np.exp(high)), reached)
    return Adjusted(p, shift, one, other, slope)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: those at most alpha are rejected with at most alpha chance of any error (Holm 1979)."""
    adjusted, running, count = [1.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def testable(smallest: Sequence[float], alpha: float) -> list[bool]:
    """Which tests can be rejected at all among so many; the others need no correction (Tarone 1990).

    The choice rests on group sizes alone, never on values, so the tests that remain are a family fixed in advance.
    """
    count = 1
    while sum(p <= alpha / count for p in smallest) > count:
        count += 1
    return [p <= alpha / count for p in smallest]
