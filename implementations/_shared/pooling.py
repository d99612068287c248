"""Pooling of tokens into nested cells in one reading, and cells added to their tokens: operators around ``cells``.

The gradient of the one is the other: what a cell's gradient gives its tokens is added to the gradient that they have
from elsewhere, which takes no pass over the tokens of its own.

B batch, H heads, T tokens, D channels; n cells of a level, level l of ``pool ** l`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import cells
from ctxbench.implementations._shared.cells_table import config, digit, support
from ctxbench.implementations._shared.ranges import _like, _rows, _strides


def pooled(
    sources: Sequence[torch.Tensor], pool: int, levels: int, ragged: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same sources, and the means of their cells at ``levels`` coarse levels.

    Args:
        sources: tensors of one shape ``[B, H, T, D]``, any strides; whoever reads them beside their cells reads what is
            returned, so that gradients meet in the kernel.
        pool: cells of one level, or tokens, that make up a cell of the next.
        levels: how many.
        ragged: the last cell of a level is the mean of the tokens it has; else only complete cells exist.

    Returns:
        The sources, and of each level ``[len(sources), B, H, n, D]``.

    Raises:
        ValueError: for shapes the kernels do not take.
    """
    answer = support(pool, levels)
    if not answer or levels < 1 or any(x.shape != sources[0].shape for x in sources):
        raise ValueError(answer.reason or f"sources must have one shape, received {[tuple(x.shape) for x in sources]}")
    T = sources[0].shape[2]
    counts = [-(-T // pool**level) if ragged else T // pool**level for level in range(1, levels + 1)]
    found = _Pooled.apply(pool, counts, ragged, *sources)
    return list(found[: len(sources)]), list(found[len(sources) :])


def raised(fine: torch.Tensor, rows: torch.Tensor, pool: int, shift: int = 0) -> torch.Tensor:
    """Each token of ``fine: [B, T, d]`` plus its row of ``rows: [B, n, d]``: of token i ``(i + shift) // pool``."""
    answer = support(pool, 1)
    if not answer or fine.shape[::2] != rows.shape[::2]:
        raise ValueError(answer.reason or f"shapes {tuple(fine.shape)} and {tuple(rows.shape)} do not fit")
    if fine.shape[1] and (fine.shape[1] - 1 + shift) // pool >= rows.shape[1]:
        raise ValueError(f"{fine.shape[1]} tokens from {shift} on read beyond {rows.shape[1]} rows of {pool}")
    return _Raised.apply(pool, shift, fine, rows)  # type: ignore[no-any-return]


class _Pooled(torch.autograd.Function):
    """Sources as they are, and the cells of all levels."""

    @staticmethod
    def forward(ctx: Any, pool: int, counts: list[int], ragged: bool, *sources: torch.Tensor) -> tuple[Any, ...]:
        ctx.pool, ctx.ragged, ctx.sources = pool, ragged, len(sources)
        return (*sources, *_gather(list(sources), pool, counts, 0, True, ragged))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        own, of_cells = list(grads[: ctx.sources]), list(grads[ctx.sources :])
        return None, None, None, *_spread(own, of_cells, ctx.pool, 0, True, ctx.ragged)


class _Raised(torch.autograd.Function):
    """Tokens and repeated rows, added; the gradient of a row is the sum over its tokens."""

    @staticmethod
    def forward(ctx: Any, pool: int, shift: int, fine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.pool, ctx.shift, ctx.rows = pool, shift, rows.shape[1]
        return _spread([fine[:, None]], [rows[None, :, None]], pool, shift, False, False)[0][:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        (rows,) = _gather([grad[:, None]], ctx.pool, [ctx.rows], ctx.shift, False, False)
        return None, None, grad, rows[0, :, 0]


@torch.library.custom_op("ctxbench::gather_cells", mutates_args=())
def _gather(
    sources: list[torch.Tensor], pool: int, counts: list[int], shift: int, mean: bool, ragged: bool
) -> list[torch.Tensor]:
    """Sums or means of the cells of each level, ``counts`` of them; the first begins ``shift`` tokens early."""
    found = _gather_fake(sources, pool, counts, shift, mean, ragged)
    T = min(sources[0].shape[2], counts[0] * pool - shift)  # tokens beyond the last cell are not read
    widest = -(-counts[0] // pool ** (len(counts) - 1))
    _launch(cells.gather_kernel, sources, found, None, pool, shift, T, widest, mean, ragged)
    return found


@torch.library.custom_op("ctxbench::spread_cells", mutates_args=())
def _spread(
    sources: list[torch.Tensor], levels: list[torch.Tensor], pool: int, shift: int, mean: bool, ragged: bool
) -> list[torch.Tensor]:
    """Each token of the sources plus the cells that hold it, divided by their tokens where they are means."""
    results, T = _spread_fake(sources, levels, pool, shift, mean, ragged), sources[0].shape[2]
    widest = -(-(T + shift) // pool ** len(levels))
    levels = [level.contiguous() for level in levels]
    _launch(cells.spread_kernel, sources, levels, results, pool, shift, T, widest, mean, ragged)
    return results


def _launch(
    kernel: Any, sources: list[torch.Tensor], levels: list[torch.Tensor], results: list[torch.Tensor] | None, pool: int,
    shift: int, T: int, widest: int, mean: bool, ragged: bool,
) -> None:  # fmt: skip
    B, H, _, D = sources[0].shape
    if not (B * H * widest * D):
        return
    chosen, padded = config(pool, len(levels), D), digit(pool)
    described = [tuple(_described(x) for x in sources), tuple((level, level.shape[3]) for level in levels)]
    if results is not None:
        described.append(tuple(_described(x) for x in results))
    programs = triton.cdiv(widest, chosen.rows // padded ** len(levels))
    with torch.cuda.device_of(sources[0]):  # Triton launches on the current device, whatever the tensors'
        kernel[programs, B * H, triton.cdiv(D, chosen.width)](
            *described, H, T, shift, SOURCES=len(sources), LEVELS=len(levels), POOL=pool, PADDED=padded, D=D,
            ROWS=chosen.rows, WIDTH=chosen.width, MEAN=mean, RAGGED=ragged, num_warps=chosen.warps,
        )  # fmt: skip


def _described(x: torch.Tensor) -> tuple[Any, ...]:
    x = _rows(x)
    return (x, *_strides(x))


@_gather.register_fake
def _gather_fake(
    sources: list[torch.Tensor], pool: int, counts: list[int], shift: int, mean: bool, ragged: bool
) -> list[torch.Tensor]:
    B, H, _, D = sources[0].shape
    return [sources[0].new_empty(len(sources), B, H, count, D) for count in counts]


@_spread.register_fake
def _spread_fake(
    sources: list[torch.Tensor], levels: list[torch.Tensor], pool: int, shift: int, mean: bool, ragged: bool
) -> list[torch.Tensor]:
    return [_like(x) for x in sources]


@formula(torch.ops.ctxbench.gather_cells, torch.ops.ctxbench.spread_cells)
def _no_products(*_: Any, **__: Any) -> int:
    """Sums alone: nothing is multiplied with anything but a constant."""
    return 0
