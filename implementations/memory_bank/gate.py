"""The gate of the read in Triton: ``y = x + sigmoid(half + read W^T) read`` as one product with an epilogue.

The gate needs whole rows of the read, all heads through their output projection, so the read itself cannot be a part of
a kernel that spreads over the device: a segment of 512 tokens would be eight blocks. What is fused is all that follows:
no product, gate or gated read is written but the gate that the backward pass asks for.

B batch, T tokens, d width of the model.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.flash_rows import _dot


class Tile(NamedTuple):
    """Rows, columns and depth of a tile of the product, warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


TILES = {2: Tile(64, 64, 64, 4, 3), 4: Tile(64, 32, 32, 4, 2)}  # by bytes of an element


@triton.jit
def _part(base, rows, stride, T, columns, width):
    """Rows and columns of a matrix ``[T, width]``, zero beyond its edges."""
    mask = (rows < T)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def gate_kernel(
    X, HALF, READ, WEIGHT, OUT, GATE, x_batch, x_row, half_batch, half_row, read_batch, read_row, w_row,
    out_batch, out_row, gate_batch, gate_row, T, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One tile of the result, and of the gate where it is kept. Grid: tiles of tokens, tiles of channels, B."""
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    READ += batch * read_batch
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        read = _part(READ, rows, read_row, T, depth, width)
        acc += _dot(read, tl.trans(_part(WEIGHT, columns, w_row, width, depth, width)))
    half = _part(HALF + batch * half_batch, rows, half_row, T, columns, width).to(tl.float32)
    gate = tl.sigmoid(half + acc)
    read = _part(READ, rows, read_row, T, columns, width).to(tl.float32)
    x = _part(X + batch * x_batch, rows, x_row, T, columns, width).to(tl.float32)
    mask = (rows < T)[:, None] & (columns < width)[None, :]
    place = OUT + batch * out_batch + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(place, (x + gate * read).to(OUT.dtype.element_ty), mask=mask)
    if KEEP:
        place = GATE + batch * gate_batch + rows.to(tl.int64)[:, None] * gate_row + columns[None, :]
        tl.store(place, gate.to(GATE.dtype.element_ty), mask=mask)


@triton.jit
def gradient_kernel(
    GRAD, GATE, READ, WEIGHT, DREAD, DHALF, grad_batch, grad_row, gate_batch, gate_row, read_batch, read_row, w_row,
    dread_batch, dread_row, dhalf_batch, dhalf_row, T, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of the read; the first tile of a row also writes that of ``half``. Grid as above."""
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    GRAD += batch * grad_batch
    GATE += batch * gate_batch
    READ += batch * read_batch
    DHALF += batch * dhalf_batch
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        grad = _part(GRAD, rows, grad_row, T, depth, width).to(tl.float32)
        gate = _part(GATE, rows, gate_row, T, depth, width).to(tl.float32)
        read = _part(READ, rows, read_row, T, depth, width)
        dhalf = (grad * read.to(tl.float32) * gate * (1.0 - gate)).to(read.dtype)
        mask = (rows < T)[:, None] & (depth < width)[None, :] & (tl.program_id(1) == 0)
        tl.store(DHALF + rows.to(tl.int64)[:, None] * dhalf_row + depth[None, :], dhalf, mask=mask)
        acc += _dot(dhalf, _part(WEIGHT, depth, w_row, width, columns, width))
    grad = _part(GRAD, rows, grad_row, T, columns, width).to(tl.float32)
    gate = _part(GATE, rows, gate_row, T, columns, width).to(tl.float32)
    mask = (rows < T)[:, None] & (columns < width)[None, :]
    place = DREAD + batch * dread_batch + rows.to(tl.int64)[:, None] * dread_row + columns[None, :]
    tl.store(place, (acc + grad * gate).to(DREAD.dtype.element_ty), mask=mask)


def _launch(x: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and compile-time arguments for ``x: [B, T, d]``."""
    tile, (B, T, width) = TILES[x.element_size()], x.shape
    return (triton.cdiv(T, tile.rows), triton.cdiv(width, tile.columns), B), {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip


def _dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same with the channels of a row side by side, as the kernels read them."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@torch.library.custom_op("ctxbench::gate", mutates_args=())
def gate(
    x: torch.Tensor, half: torch.Tensor, read: torch.Tensor, weight: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result of ``x``, ``half`` and ``read``, all ``[B, T, d]``, and ``weight: [d, d]``; and the gate to ``keep``."""
    x, half, read, weight = _dense(x, half, read, weight)
    out, gate = _results(x, keep)
    grid, options = _launch(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors'
        gate_kernel[grid](
            x, half, read, weight, out, gate, *_pitches(x, half, read), weight.stride(0), *_pitches(out, gate),
            *x.shape[1:], KEEP=keep, **options,
        )  # fmt: skip
    return out, gate


@torch.library.custom_op("ctxbench::gate_backward", mutates_args=())
def gate_backward(
    grad: torch.Tensor, gate: torch.Tensor, read: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``read`` and of ``half``, ``[B, T, d]``."""
    grad, read, weight = _dense(grad, read, weight)
    dread, dhalf = (torch.empty_like(gate) for _ in range(2))
    grid, options = _launch(gate)
    with torch.cuda.device_of(gate):
        gradient_kernel[grid](
            grad, gate, read, weight, dread, dhalf, *_pitches(grad, gate, read), weight.stride(0),
            *_pitches(dread, dhalf), *gate.shape[1:], **options,
        )  # fmt: skip
    return dread, dhalf


def _pitches(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _results(x: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else (0, 0, 0))


@gate.register_fake
def _(x: torch.Tensor, half: Any, read: Any, weight: Any, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(x, keep)


@gate_backward.register_fake
def _(grad: Any, gate: torch.Tensor, read: Any, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate)


@formula(torch.ops.ctxbench.gate)
def _gate_flops(x: Any, half: Any, read: Any, weight: Any, keep: bool, **_: Any) -> int:
    return int(2 * x.numel() * weight.shape[0])


@formula(torch.ops.ctxbench.gate_backward)
def _gate_backward_flops(grad: Any, gate: Any, read: Any, weight: Any, **_: Any) -> int:
    return int(2 * gate.numel() * weight.shape[0])


class Gated(torch.autograd.Function):
    """``x + sigmoid(half + read W^T) read``: all ``[B, T, d]``, ``weight: [d, d]``; ``keep`` for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, half: torch.Tensor, read: torch.Tensor, weight: torch.Tensor, keep: bool
    ) -> torch.Tensor:  # fmt: skip
        out, kept = gate(x, half, read, weight, keep)
        ctx.save_for_backward(kept, read, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, read, weight = ctx.saved_tensors
        dread, dhalf = gate_backward(grad, kept, read, weight)
        return grad, dhalf, dread, dhalf.flatten(0, 1).T @ read.flatten(0, 1), None
