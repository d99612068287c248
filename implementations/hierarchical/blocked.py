"""Slabs of queries against the cells they see; neither pass holds more than one slab's scores.

A slab is a run of about 128 queries, a multiple of the widest cell. Of every scale its queries see one run of
neighbouring cells, hidden from some of them in two corners alone: cells that are not yet to be seen by the first
queries, and cells that the last ones have left behind. All scales' scores lie side by side in one buffer, so one
softmax serves them. The backward pass computes the probabilities again, as fused kernels do: five products for the
forward two. Gradients of keys and values are summed in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ctxbench.implementations.hierarchical.layer import Operators
from ctxbench.implementations.hierarchical.params import Scale, slab_rows


def attend(
    q: torch.Tensor, levels: Sequence[torch.Tensor], scales: Sequence[Scale], start: int,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """As in the reference; the result is stored as ``[B, T, H, D]``."""
    return _MultiScale.apply(q, scales, start, line, *levels)


class Corner(NamedTuple):
    """Columns of a slab's scores that some rows do not see: entry (r, c) is hidden where r < or >= a row of c.

    That row is ``first`` for the first ``group`` columns, and later by as many cells for each next group.
    ``left``: the cells are left behind from that row on; else they are to be seen from that row on.
    """

    columns: slice
    first: int
    left: bool
    group: int = 1


class Part(NamedTuple):
    """One scale of a slab: where its scores lie, which of the remembered cells they are of, and what is hidden.

    ``back``: tokens from the last one of the first cell to the slab's first query.
    """

    level: int
    columns: slice
    cells: slice
    back: int
    corners: tuple[Corner, ...]


class Slab(NamedTuple):
    """Queries ``rows`` of the call, the scales they see, and the number of columns of all of them."""

    rows: slice
    parts: tuple[Part, ...]
    width: int


def plan(T: int, start: int, held: Sequence[int], scales: Sequence[Scale]) -> Iterator[Slab]:
    """Slabs that cover T queries from token ``start`` on; ``held`` complete cells of each scale are at hand."""
    step = slab_rows(scales)
    for begin in range(0, T, step):
        end = min(begin + step, T)
        parts, width = [], 0
        for level, (count, scale) in enumerate(zip(held, scales, strict=True)):
            first, last = scale.sees(start + begin), scale.sees(start + end - 1)
            low, high = first.start, last.stop
            if high == low:
                continue
            columns = slice(width, width + high - low)
            width = columns.stop
            behind = min(last.start, high)  # cells before it are left behind by the last row
            corners = []
            if behind > low:  # the row after the last one that sees cell c has cell c + most, or hands c on
                if scale.handed is None:
                    leaves = scale.behind + (low + scale.most + 1) * scale.span
                else:
                    leaves = scale.handed + (low + scale.group) * scale.span
                left = slice(columns.start, columns.start + behind - low)
                corners.append(Corner(left, leaves - 1 - start - begin, True, scale.group))
            if high > max(first.stop, low):
                fresh = max(first.stop, low)
                appears = scale.behind + (fresh + 1) * scale.span - 1 - start - begin
                corners.append(Corner(slice(columns.start + fresh - low, columns.stop), appears, False))
            missing = (start + T) // scale.span - count
            back = start + begin - ((low + 1) * scale.span - 1)
            parts.append(Part(level, columns, slice(low - missing, high - missing), back, tuple(corners)))
        yield Slab(slice(begin, end), tuple(parts), width)


class _Work:
    """Operands of one pass: keys and values by head, the plan, and the masks, which slabs share."""

    def __init__(
        self, q: torch.Tensor, levels: Sequence[torch.Tensor], scales: Sequence[Scale], start: int,
        line: torch.Tensor | None,
    ):  # fmt: skip
        B, H, T, self.D = q.shape
        self.q, self.batch, self.scales, self.line = q, B * H, scales, line
        self.levels = [level.flatten(1, 2) for level in levels]  # [2, B * H, n, D]
        self.slabs = list(plan(T, start, [level.shape[3] for level in levels], scales))
        self.largest = max((slab.rows.stop - slab.rows.start) * slab.width for slab in self.slabs)
        self._hidden: dict[tuple[int, int, int, int, bool, int], torch.Tensor] = {}

    def buffer(self) -> torch.Tensor:
        """Room for the scores of any slab."""
        return self.q.new_empty(self.batch * self.largest)

    def shaped(self, buffer: torch.Tensor, slab: Slab) -> torch.Tensor:
        """The head of a buffer as one slab's scores, ``[B * H, rows, width]``."""
        rows = slab.rows.stop - slab.rows.start
        return buffer[: self.batch * rows * slab.width].view(self.batch, rows, slab.width)

    def by_head(self, tensor: torch.Tensor, slab: Slab) -> torch.Tensor:
        """One slab of ``[B, H, T, D]`` as ``[B * H, rows, D]``."""
        return tensor[:, :, slab.rows].reshape(self.batch, -1, self.D).contiguous()

    def probabilities(self, query: torch.Tensor, scores: torch.Tensor, slab: Slab) -> torch.Tensor:
        """Softmax over the visible tokens and cells, in the place of the scores."""
        for part in slab.parts:
            columns, span = scores[:, :, part.columns], self.scales[part.level].span
            plain = span == 1 and self.line is None  # then what the buffer held before is overwritten
            if not plain:
                columns.fill_(math.log(span))
            if self.line is not None:
                tile = self.line[:, self.steps(part, scores.shape[1])]
                columns.unflatten(0, (-1, len(tile))).add_(tile)
            keys = self.levels[part.level][0][:, part.cells].transpose(1, 2)
            columns.baddbmm_(query, keys, beta=0 if plain else 1)
            for corner in part.corners:
                scores[:, :, corner.columns].masked_fill_(self._mask(corner, scores.shape[1], span), float("-inf"))
        return torch.softmax(scores, dim=2, out=scores)

    def steps(self, part: Part, rows: int) -> torch.Tensor:
        """Tokens from the last one of each cell to each query, ``[rows, n]``; hidden pairs have any."""
        row = torch.arange(rows, device=self.q.device)[:, None]
        cell = torch.arange(part.cells.stop - part.cells.start, device=self.q.device)
        return (part.back + row - cell * self.scales[part.level].span).clamp(min=0)

    def _mask(self, corner: Corner, rows: int, span: int) -> torch.Tensor:
        count = corner.columns.stop - corner.columns.start
        key = (rows, count, corner.first, span, corner.left, corner.group)
        if key not in self._hidden:
            row = torch.arange(rows, device=self.q.device)[:, None]
            groups = torch.arange(-(-count // corner.group), device=self.q.device) * (span * corner.group)
            turn = corner.first + groups.repeat_interleave(corner.group)[:count]
            self._hidden[key] = row >= turn if corner.left else row < turn
        return self._hidden[key]


class _MultiScale(torch.autograd.Function):
    """One softmax over all scales, slab by slab."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, scales: Sequence[Scale], start: int, line: torch.Tensor | None, *levels: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(q, line, *levels)
        ctx.scales, ctx.start = scales, start
        B, H, T, D = q.shape
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        work = _Work(q, levels, scales, start, line)
        buffer = work.buffer()
        for slab in work.slabs:
            query = work.by_head(q, slab) * D**-0.5
            p = work.probabilities(query, work.shaped(buffer, slab), slab)
            query.zero_()
            for part in slab.parts:
                query.baddbmm_(p[:, :, part.columns], work.levels[part.level][1][:, part.cells])
            out[:, :, slab.rows] = query.view(B, H, -1, D)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, line, *levels = ctx.saved_tensors
        B, H, _, D = q.shape
        scale = D**-0.5
        work = _Work(q, levels, ctx.scales, ctx.start, line)
        wide = torch.promote_types(q.dtype, torch.float32)
        dline = torch.zeros_like(line, dtype=wide) if ctx.needs_input_grad[3] else None
        sums = [torch.zeros_like(level, dtype=wide) for level in work.levels]
        dq = torch.empty_like(q)
        scores, dscores = work.buffer(), work.buffer()
        for slab in work.slabs:
            query, dout = work.by_head(q, slab) * scale, work.by_head(grad, slab)
            p = work.probabilities(query, work.shaped(scores, slab), slab)
            ds = work.shaped(dscores, slab)
            for part in slab.parts:
                values = work.levels[part.level][1][:, part.cells]
                ds[:, :, part.columns].baddbmm_(dout, values.transpose(1, 2), beta=0)
                _add(sums[part.level][1][:, part.cells], p[:, :, part.columns].transpose(1, 2), dout)
            torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
            dquery = torch.zeros_like(query)
            for part in slab.parts:
                columns = ds[:, :, part.columns]
                if dline is not None:
                    above = columns.unflatten(0, (B, H)).sum(dim=0, dtype=wide)
                    dline.index_add_(1, work.steps(part, above.shape[1]).flatten(), above.flatten(1))
                _add(sums[part.level][0][:, part.cells], columns.transpose(1, 2), query)
                dquery.baddbmm_(columns, work.levels[part.level][0][:, part.cells], alpha=scale)
            dq[:, :, slab.rows] = dquery.view(B, H, -1, D)
        grads = [total.to(q.dtype).view(level.shape) for total, level in zip(sums, levels, strict=True)]
        return dq, None, None, None if dline is None else dline.to(q.dtype), *grads


def _add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b``, in one product where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(torch.bmm(a, b))


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention among the cells of one scale; keeps no score matrix."""
    return scaled_dot_product_attention(q, k, v)


def fuse(
    branches: Sequence[torch.Tensor], kernels: Sequence[torch.Tensor], biases: Sequence[torch.Tensor],
    weight: torch.Tensor, bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As in the reference, without the concatenation: each scale is projected by its own columns and added."""
    T, d = branches[0].shape[1:]
    columns = weight.split(d, dim=1)
    fused = linear(branches[0], columns[0], bias)
    for cells, kernel, shift, own in zip(branches[1:], kernels, biases, columns[1:], strict=True):
        up = linear(cells, kernel.permute(2, 1, 0).flatten(0, 1), shift.repeat(kernel.shape[2]))  # [B, n, s * d]
        fused = fused + linear(up.unflatten(2, (-1, d)).flatten(1, 2)[:, :T], own)
    return fused


OPERATORS = Operators(attend, mix, fuse)
