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
    tail = np.cumsum(u_distribution(len(a), len(b)))
    cut = max(int(np.searchsorted(tail, (1 - confidence) / 2, side="right")) - 1, 0)
    low, high = np.exp(ratios[cut]), np.exp(ratios[len(ratios) - 1 - cut])
    if len(ratios) == 1:
        low = high = math.nan
    return Shift(float(np.exp(np.median(ratios))), float(low), float(high), max(0.0, 1 - 2 * float(tail[cut])))


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
