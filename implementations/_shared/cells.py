"""Cells of all levels from one reading of their tokens, and the way back, in Triton; ``pooling`` has the operators.

A cell of level l holds ``pool ** l`` tokens, and cells nest. A program takes whole cells of the widest level and a few
channels: it reads their tokens once and writes the cells of every level, or reads the cells of every level and writes
the tokens they cover. No sum is shared between programs, so every run gives the same bits.

A tile has a power of two of places for the cells that make up a wider one, PADDED for POOL, so that the tokens of a
cell are places side by side whatever POOL is: the number of a place, written with digits of PADDED, is read with digits
of POOL, and a digit of POOL or more is a place without a token.

What kernels call ``sources`` and ``results`` are tuples ``(X, batch, head, row)`` of tensors ``[B, H, T, D]`` with
strides in elements, ``levels`` tuples ``(CELLS, count)`` of contiguous tensors ``[sources, B, H, count, D]``, fine to
coarse. Cell 0 begins ``shift`` tokens before token 0. MEAN divides sums by the tokens of a cell, or, where RAGGED, by
those of them that there are.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _numbers(first, SIZE: tl.constexpr, DIGITS: tl.constexpr, POOL: tl.constexpr, PADDED: tl.constexpr):
    """Of each of SIZE places the number of its cell, ``first`` that of the first widest one, and whether it has one."""
    place = tl.arange(0, SIZE)
    if POOL == PADDED:
        return first * POOL**DIGITS + place, place >= 0
    number, inside = (first + place // PADDED**DIGITS) * POOL**DIGITS, place >= 0
    for which in tl.static_range(DIGITS):
        digit = place // PADDED**which % PADDED
        number += digit * POOL**which
        inside = inside & (digit < POOL)
    return number, inside


@triton.jit
def _of_level(
    levels, LEVEL: tl.constexpr, which, first, channel, T, shift, LEVELS: tl.constexpr, POOL: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Pointers to a tile of cells ``[SIZE, WIDTH]``, which of them there are, and what their sums are multiplied by."""
    SIZE: tl.constexpr = ROWS // PADDED**LEVEL
    SPAN: tl.constexpr = POOL**LEVEL
    CELLS, count = levels[LEVEL - 1]
    cell, inside = _numbers(first, SIZE, LEVELS - LEVEL, POOL, PADDED)
    row = (which * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * count + cell
    there = (inside & (cell < count))[:, None] & (channel < D)
    weight = tl.full((SIZE, 1), 1.0 / SPAN if MEAN else 1.0, tl.float32)
    if MEAN and RAGGED:
        held = tl.minimum((cell + 1) * SPAN, T + shift) - cell * SPAN
        weight = 1.0 / tl.maximum(held, 1).to(tl.float32)[:, None]
    return CELLS + row[:, None] * D + channel, there, weight


@triton.jit
def _of_tokens(
    source, heads, first, channel, T, shift, ROWS: tl.constexpr, LEVELS: tl.constexpr, POOL: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pointers to a tile of tokens ``[ROWS, WIDTH]``, and which of them there are before T."""
    number, inside = _numbers(first, ROWS, LEVELS, POOL, PADDED)
    token = number - shift
    there = (inside & (token >= 0) & (token < T))[:, None] & (channel < D)
    head = tl.program_id(1).to(tl.int64)
    base = source[0] + head // heads * source[1] + head % heads * source[2]
    return base + token.to(tl.int64)[:, None] * source[3] + channel, there


@triton.jit
def gather_kernel(
    sources, levels, heads, T, shift, SOURCES: tl.constexpr, LEVELS: tl.constexpr, POOL: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MEAN: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Sums or means of tokens before T: the cells of all levels of a tile."""
    first = tl.program_id(0) * (ROWS // PADDED**LEVELS)
    channel = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
    for which in tl.static_range(SOURCES):
        pointers, there = _of_tokens(sources[which], heads, first, channel, T, shift, ROWS, LEVELS, POOL, PADDED, D)
        total = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
        for level in tl.static_range(1, LEVELS + 1):
            total = tl.sum(tl.reshape(total, (ROWS // PADDED**level, PADDED, WIDTH)), 1)
            pointers, there, weight = _of_level(
                levels, level, which, first, channel, T, shift, LEVELS, POOL, PADDED, D, ROWS, MEAN, RAGGED
            )
            tl.store(pointers, (total * weight).to(pointers.dtype.element_ty), mask=there)


@triton.jit
def spread_kernel(
    sources, levels, results, heads, T, shift, SOURCES: tl.constexpr, LEVELS: tl.constexpr, POOL: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MEAN: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Each token, plus the cells of all levels that hold it, divided as ``gather_kernel`` divides them."""
    first = tl.program_id(0) * (ROWS // PADDED**LEVELS)
    channel = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
    for which in tl.static_range(SOURCES):
        total = tl.zeros((ROWS // PADDED**LEVELS, WIDTH), tl.float32)
        for done in tl.static_range(LEVELS):
            pointers, there, weight = _of_level(
                levels, LEVELS - done, which, first, channel, T, shift, LEVELS, POOL, PADDED, D, ROWS, MEAN, RAGGED
            )
            total += tl.load(pointers, mask=there, other=0.0).to(tl.float32) * weight
            total = tl.broadcast_to(total[:, None, :], (ROWS // PADDED ** (LEVELS - done), PADDED, WIDTH))
            total = tl.reshape(total, (ROWS // PADDED ** (LEVELS - 1 - done), WIDTH))
        pointers, there = _of_tokens(sources[which], heads, first, channel, T, shift, ROWS, LEVELS, POOL, PADDED, D)
        total += tl.load(pointers, mask=there, other=0.0).to(tl.float32)
        pointers, there = _of_tokens(results[which], heads, first, channel, T, shift, ROWS, LEVELS, POOL, PADDED, D)
        tl.store(pointers, total.to(pointers.dtype.element_ty), mask=there)
