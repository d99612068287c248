"""The online softmax and its gradient, in Triton: what kernels of attention do with one tile of scores.

Scores times ``factor`` are in base 2, and minus infinity where a row does not see a key. Rows are *held*, see
``flash_rows``.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl

from ctxbench.implementations._shared.flash_rows import _product, _weighted

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _online(top, total, scores, factor):
    """Running maximum and sum of rows after more scores; the weights of these, and what earlier weights shrink by."""
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: keep inf - inf out
    p = tl.exp2(scores * factor - shift[:, None])
    shrink = tl.exp2(top - shift)
    return higher, total * shrink + tl.sum(p, 1), p, shrink


@triton.jit
def _mean(total, acc):
    """Output at the end, 0 for rows that see no key."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _log_sum(top, total):
    """Natural log-sum-exp at the end, minus infinity for rows that see no key."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)


@triton.jit
def _lse(LSE, row, count):
    """The log-sum-exp of rows for the backward pass, in base 2; 0 for rows that see no key, to keep inf - inf out."""
    lse = tl.load(LSE + row, mask=row < count, other=0.0) * LOG2_E
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def _add_dq(
    dq, scores, factor, lse, delta, grad, k, v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, before the scale, with what the scores ``[ROWS, COLUMNS]`` of some keys add."""
    p = tl.exp2(scores * factor - lse[:, None])
    ds = p * (_product(grad, v, ROWS, COLUMNS, D, WIDTH, CHUNK) - delta[:, None])
    return dq + _weighted(ds, k, COLUMNS, D, WIDTH, CHUNK)


@triton.jit
def _add_dkv(
    dk, dv, scores, factor, lse, delta, q, grad, v, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and of values with what the scores ``[COLUMNS, ROWS]`` of some queries add."""
    p = tl.exp2(scores * factor - lse[None, :])
    dv += _weighted(p, grad, ROWS, D, WIDTH, CHUNK)
    ds = p * (_product(v, grad, COLUMNS, ROWS, D, WIDTH, CHUNK) - delta[None, :])
    return dk + _weighted(ds, q, ROWS, D, WIDTH, CHUNK), dv
