"""Rows of channels in Triton: tiles of them loaded, stored and multiplied, for all kernels of attention.

A product of rows with rows sums over channels, and with all channels of a wide head in float32 its operands would spill
registers. So rows are *held*: as a loaded tile, or, where CHUNK is less than WIDTH, as ``(base, start, stride, count)``
of where they lie, from which a product reads CHUNK channels at a time, and again for each tile.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(base, start, stride, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``start .. start + ROWS`` of a ``[count, D]`` matrix as ``[ROWS, WIDTH]``, zero beyond either edge."""
    return _channels(base, start, stride, count, 0, ROWS, D, WIDTH, WIDTH)


@triton.jit
def _channels(
    base, start, stride, count, channel, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """Of what ``_load`` gives, CHUNK channels from one on; BEFORE: ``start`` may be negative."""
    row, column = tl.arange(0, ROWS), channel + tl.arange(0, CHUNK)
    base += tl.cast(start, tl.int64) * stride
    mask = row[:, None] < count - start
    if BEFORE:
        mask = ((row >= -start) & (row < count - start))[:, None]
    if D < WIDTH:
        mask = mask & (column[None, :] < D)
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, start, stride, count, value, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write what ``_load`` would read."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    base += tl.cast(start, tl.int64) * stride
    mask = row[:, None] < count - start
    if D < WIDTH:
        mask = mask & (column[None, :] < D)
    tl.store(base + row[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b):
    """``a @ b`` in float32; float32 operands as three products of TF32, whose error is float32's own."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _held(
    base, start, stride, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """Rows for ``_product``: as ``_load`` gives them, or where they lie if it takes CHUNK channels at a time."""
    held = base, start, stride, count
    if CHUNK == WIDTH:
        held = _channels(base, start, stride, count, 0, ROWS, D, WIDTH, WIDTH, BEFORE)
    return held


@triton.jit
def _whole(
    held, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BEFORE: tl.constexpr = False
):
    """Rows that are held, with all their channels."""
    whole = held
    if CHUNK < WIDTH:
        whole = _channels(held[0], held[1], held[2], held[3], 0, ROWS, D, WIDTH, WIDTH, BEFORE)
    return whole


@triton.jit
def _product(
    a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """``a @ b.T`` of ROWS rows and COLUMNS rows that are held; BEFORE: ``b`` may begin before row 0."""
    if CHUNK < WIDTH:
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for channel in range(0, WIDTH, CHUNK):
            left = _channels(a[0], a[1], a[2], a[3], channel, ROWS, D, WIDTH, CHUNK)
            right = _channels(b[0], b[1], b[2], b[3], channel, COLUMNS, D, WIDTH, CHUNK, BEFORE)
            product += _dot(left, tl.trans(right))
    else:
        product = _dot(a, tl.trans(b))
    return product


@triton.jit
def _weighted(
    weights, held, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    BEFORE: tl.constexpr = False,
):  # fmt: skip
    """``weights @ rows`` of ROWS rows that are held."""
    rows = _whole(held, ROWS, D, WIDTH, CHUNK, BEFORE)
    return _dot(weights.to(rows.dtype), rows)
