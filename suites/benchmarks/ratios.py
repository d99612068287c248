"""Ratios of times that survive a noisy machine: interleaved rounds, medians of ratios, an A/A control."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ctxbench.run.client import HEAPS

HEAP_KEPT = HEAPS["timing"]  # the setting of every timing process


@dataclass
class Comparison:
    """Functions of equal work; ``baseline`` names the one that the others are divided into.

    ``floor`` is, by candidate, the least ratio baseline time / candidate time that is acceptable; ``aim`` the goal.
    """

    title: str
    baseline: str
    candidates: Mapping[str, Callable[[], Any]]
    floor: dict[str, float] = field(default_factory=dict)
    aim: dict[str, float] = field(default_factory=dict)


@dataclass
class Ratio:
    """Baseline time / candidate time: median of the rounds' ratios, and their quartiles."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


def interleave(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 7, seconds: float = 0.1
) -> dict[str, list[float]]:
    """Best seconds a call of each candidate in each round; the order is reversed every round."""
    for function in candidates.values():
        function()
    best: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            best[name].append(_best_of(candidates[name], seconds))
    return best


def _best_of(function: Callable[[], Any], seconds: float) -> float:
    best, spent = float("inf"), 0.0
    while spent < seconds:
        start = time.perf_counter()
        function()
        elapsed = time.perf_counter() - start
        best, spent = min(best, elapsed), spent + elapsed
    return best


def compare(comparison: Comparison, rounds: int = 7, seconds: float = 0.1) -> list[Ratio]:
    """Measure one comparison; the row ``<baseline> again`` is the A/A control and must be 1 within the noise."""
    baseline = comparison.baseline
    control = f"{baseline} again"
    functions = {**comparison.candidates, control: comparison.candidates[baseline]}
    times = interleave(functions, rounds, seconds)
    results = []
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(times[baseline], own, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        results.append(Ratio(name, statistics.median(own), statistics.median(ratios), low, high))
    return results


def show(comparison: Comparison, results: list[Ratio]) -> bool:
    """Print one table; returns whether every floor was reached."""
    out = sys.stdout.write
    out(f"\n{comparison.title}\n")
    reached = True
    for result in results:
        floor, aim = comparison.floor.get(result.name), comparison.aim.get(result.name)
        goal = ""
        if floor is not None:
            met = result.ratio >= floor
            reached &= met
            goal = f"  at least {floor:g}{f', aim {aim:g}' if aim else ''}: {'reached' if met else 'MISSED'}"
        out(
            f"  {result.name:<34}{result.seconds * 1e3:10.2f} ms  {result.ratio:6.2f}x "
            f"[{result.low:.2f}, {result.high:.2f}]{goal}\n"
        )
    return reached


def with_kept_heap() -> None:
    """Start this program again with glibc keeping freed memory, which it reads only at process start."""
    if any(os.environ.get(name) != value for name, value in HEAP_KEPT.items()):
        arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
        os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **HEAP_KEPT})
