"""RoPE by kernels: keys turned in one pass over memory, and queries that attention turns where it reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import ranges
from ctxbench.implementations._shared.flash_table import TURN_HEADS, padded, turn_rows
from ctxbench.implementations._shared.positions import Position, Positions, Rotary, Tables, positions_for
from ctxbench.method import Dims

BY_KERNELS = ("triton", "graph", "diagonal_triton")  # impls whose attention is ``ranges.attend`` on a device
Index = tuple[slice | Sequence[int], ...]


@dataclass(frozen=True)
class Unturned:
    """Queries as a projection leaves them, and what turns them: ``ranges.attend`` takes them for queries.

    Attributes:
        x: ``[B, H, T, D]``.
        cos: of each query and pair of channels ``[T, D / 2]``, float32, as ``sin``.
        sin: likewise.
    """

    x: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __getitem__(self, index: Index) -> Unturned:
        """Some batches, heads and tokens."""
        tokens = index[2] if len(index) > 2 else slice(None)
        return Unturned(self.x[index], self.cos[tokens], self.sin[tokens])

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def requires_grad(self) -> bool:
        return self.x.requires_grad

    def turned(self) -> torch.Tensor:
        """The rotated queries ``[B, H, T, D]``, for who needs them in memory."""
        return turned(self.x, Tables(self.cos, self.sin))


def launch(x: torch.Tensor, out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> None:
    """Turn ``x: [B, H, T, D]``, channels side by side, into ``out``, which may be ``x``; or turn it back."""
    from ctxbench.implementations._shared import flash_turned  # Triton is a package of its own

    B, H, T, D = x.shape
    rows = turn_rows(D)
    grid = -(-T // rows) * -(-B * H // TURN_HEADS)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors'
        flash_turned.turn_kernel[grid,](
            x, out, cos, sin, *ranges._strides(x, out), cos.stride(0), H, B * H, T, D=D, HALF=padded(D) // 2,
            ROWS=rows, HEADS=TURN_HEADS, BACK=back, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("ctxbench::turn", mutates_args=())
def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    x = ranges._rows(x)
    out = ranges._like(x)
    if out.numel():
        launch(x, out, cos, sin, back=back)
    return out


@_turn.register_fake
def _turn_fake(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    return ranges._like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return _turn(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_turn.register_autograd(_differentiate, setup_context=_save)


@formula(torch.ops.ctxbench.turn)
def _turn_flops(*_: Any, **__: Any) -> int:
    """Rotations act element by element, and these count as nothing."""
    return 0


def turned(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """``positions.turn`` of ``x: [B, H, T, D]`` by a kernel, heads where they are; gradients go through ``x`` alone."""
    out: torch.Tensor = _turn(x, *tables, False)
    return out


class Turning(Rotary):
    """:class:`Rotary` for impls whose attention turns its queries; on a CPU it is that class, as attention is C++'s.

    And it is where every sequence has positions of its own: tables of the kernels are those of all sequences.
    """

    def rotate(self, x: torch.Tensor, positions: Positions, step: int = 1) -> torch.Tensor:
        if ranges.native(x) or (isinstance(positions, torch.Tensor) and positions.dim() > 1):
            return super().rotate(x, positions, step)
        return turned(x, self.tables(positions, x.shape[-2], x.dtype, step))

    def queries(self, q: torch.Tensor, positions: Positions, step: int = 1) -> Any:
        if ranges.native(q):
            return super().queries(q, positions, step)
        return Unturned(q, *self.tables(positions, q.shape[2], q.dtype, step))

    def both(self, q: torch.Tensor, k: torch.Tensor, positions: Positions, step: int = 1) -> Any:
        if ranges.native(q):
            return super().both(q, k, positions, step)
        tables = self.tables(positions, q.shape[2], q.dtype, step)
        return Unturned(q, *tables), turned(k, tables)

    def rotate_both(
        self, q: torch.Tensor, k: torch.Tensor, positions: Positions, step: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if ranges.native(q):
            return super().rotate_both(q, k, positions, step)
        tables = self.tables(positions, q.shape[2], q.dtype, step)
        return turned(q, tables), turned(k, tables)


def positions_of(dims: Dims, impl: str, layers: int | None = None) -> list[Position]:
    """``positions_for`` a method's impl: where its attention is Triton's, rotations are by kernels."""
    return positions_for(dims, layers, Turning if impl in BY_KERNELS else Rotary)
