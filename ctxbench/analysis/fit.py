"""Time as a constant plus non-negative weights on a method's own cost terms.

``t = w0 + w1 steps + w2 bytes + sum(w_i FLOPs_i)`` over the FLOP terms the method declares. What is minimised is the
relative error (rows divided by ``t``), so that the shortest length counts as much as the longest. A run has few
lengths and many terms, and several terms grow alike; so all FLOP terms first share one rate, and each may then leave
it as far as the data ask for, at the price ``PULL`` in relative error for a rate that is off by its own size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ctxbench.cell import Cell
from ctxbench.cost.figures import Evaluator
from ctxbench.cost.roofline import steps, traffic
from ctxbench.method import Method

PULL = 0.1
LEAST_LENGTHS = 2
FLOPS = "FLOPs: "

Terms = Mapping[str, float]


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds a unit of each term; terms that do not help have the weight 0."""

    weights: dict[str, float]

    def predict(self, terms: Terms) -> float:
        """Seconds of one call."""
        return sum(weight * terms.get(name, 0.0) for name, weight in self.weights.items())


class PowerLaw(msgspec.Struct, frozen=True, kw_only=True):
    """``t = exp(intercept) T^exponent``: what a fit that knows no formula would say."""

    intercept: float
    exponent: float

    def predict(self, seq_len: float) -> float:
        """Seconds of one call."""
        return math.exp(self.intercept) * float(seq_len) ** self.exponent


def cost_terms(method: Method, cell: Cell, evaluator: Evaluator) -> dict[str, float] | None:
    """The terms of one cell: 1, dependent steps, bytes of an unfused program, FLOPs by term.

    None where the method declares no formulas, or one of them fails.
    """
    try:
        figures, flops = evaluator.figures(method, cell), evaluator.terms(method, cell)
    except Exception:  # a plug-in's formula may raise anything; without it there is nothing to fit
        return None
    if figures is None:
        return None
    plain: dict[str, Any] = {"constant": 1, "steps": steps(cell, figures), "bytes": traffic(cell, figures)}
    return {name: float(value) for name, value in (plain | {FLOPS + n: v for n, v in flops.items()}).items()}


def fit(terms: Sequence[Terms], seconds: Sequence[float]) -> Fit:
    """Fit the weights; at least two lengths.

    Args:
        terms: the terms of each measured cell, all with the same names.
        seconds: seconds of one call of each.
    """
    if len(terms) < LEAST_LENGTHS or len(terms) != len(seconds):
        raise ValueError(f"a fit needs the terms and seconds of two lengths, received {len(terms)} and {len(seconds)}")
    times = np.asarray(seconds, float)
    names = list(terms[0])
    flops = [name for name in names if name.startswith(FLOPS)]
    other = [name for name in names if name not in flops]
    matrix = np.array([[row[name] for name in names] for row in terms])
    total = np.array([[sum(row[name] for name in flops)] for row in terms])
    kept = matrix[:, [names.index(name) for name in other]]
    shared = _solve(np.hstack([kept, total]), times, {})
    rate = float(shared[-1])
    if rate == 0 or len(flops) < 2:
        return Fit(weights=dict(zip(other, map(float, shared), strict=False)) | dict.fromkeys(flops, rate))
    solved = _solve(matrix, times, {names.index(name): rate for name in flops})
    return Fit(weights=dict(zip(names, map(float, solved), strict=True)))


def power_law(lengths: Sequence[int], seconds: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms; at least two lengths."""
    exponent, intercept = np.polyfit(np.log(np.asarray(lengths, float)), np.log(np.asarray(seconds, float)), 1)
    return PowerLaw(intercept=float(intercept), exponent=float(exponent))


def _solve(matrix: np.ndarray, times: np.ndarray, rates: Mapping[int, float]) -> np.ndarray:
    """Non-negative weights of least relative error; ``rates`` draws columns to a weight."""
    from scipy.optimize import nnls

    scale = np.where(matrix.max(axis=0) > 0, matrix.max(axis=0), 1.0) / float(times.mean())
    rows, wanted = [matrix / scale / times[:, None]], [np.ones(len(times))]
    for column, rate in rates.items():
        row = np.zeros(matrix.shape[1])
        row[column] = PULL / (rate * scale[column])
        rows.append(row[None])
        wanted.append(np.array([PULL]))
    weights, _ = nnls(np.vstack(rows), np.concatenate(wanted))
    return np.asarray(weights / scale)
