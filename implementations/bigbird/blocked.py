"""Gathered blocks in slabs: dense products without any mask, and no more than one slab's scores in either pass.

Keys and values are copied once so that a block is one row of a matrix. A slab is a few blocks of queries, or a piece of
one where it is long; the blocks its rows see are gathered side by side, and since every row of a slab sees equally
many, the slab is one batched product.
The two rows next to the ends see one block less and are a slab of their own. Queries of the two global rows meet all
keys, a few heads at a time. Only the last block may be shorter; every list ends with it, so the gathered keys are cut
there and every executed pair is a visible one. The backward pass computes the probabilities again, as fused kernels do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.products import Part, parts
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.bigbird.layer import Plan

SLAB = 256  # queries whose scores are alive together
END = 128  # queries of global rows whose scores are alive together, for as many heads as
END_SCORES = 1 << 20  # scores of them: few enough for a last-level cache, but of two heads at least


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, position: Position | None = None
) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape."""
    if not isinstance(position, Bias):
        return scaled_dot_product_attention(q, k, v) if plan.num_blocks <= 2 else Blocks.apply(q, k, v, plan, None)
    if plan.num_blocks <= 2:
        return attend_slabs(q, k, v, causal=False, position=position)
    T = q.shape[2]
    return Blocks.apply(q, k, v, plan, position.bias(torch.arange(1 - T, T, device=q.device), q.dtype))


class Slab(NamedTuple):
    """Rows of blocks that see equally many columns each: ``columns: [H, rows, n]``."""

    rows: slice
    columns: torch.Tensor


def slabs(plan: Plan) -> Iterator[Slab]:
    """Every row between the first and the last, once."""
    step, stop = max(1, SLAB // plan.size), plan.num_blocks - 2
    yield Slab(slice(1, stop + 1, max(1, stop - 1)), plan.edges)
    for start in range(2, stop, step):
        yield Slab(slice(start, min(start + step, stop)), plan.inner[:, start - 2 : start - 2 + step])


class End(NamedTuple):
    """Queries of the first and of the last block, one or two ranges of tokens, in some heads of the batch."""

    tokens: tuple[slice, ...]
    part: Part

    @property
    def queries(self) -> int:
        """Of all these heads together."""
        return self.part.items * sum(a.stop - a.start for a in self.tokens)


def ends(plan: Plan, B: int, H: int, T: int) -> Iterator[End]:
    """Every token of the first and of the last block in every head, once."""
    last = (plan.num_blocks - 1) * plan.size
    tokens = plan.size + T - last
    fit = max(2, END_SCORES // (min(tokens, END) * T))
    for begin in range(0, tokens, END):
        stop = min(begin + END, tokens)
        near, skipped = slice(begin, min(stop, plan.size)), last - plan.size
        far = slice(skipped + max(begin, plan.size), skipped + stop)
        pieces = tuple(piece for piece in (near, far) if piece.start < piece.stop)
        yield from (End(pieces, part) for part in parts(B, H, fit))


class Biases(NamedTuple):
    """What is added to the scores of one slab: ``line: [H, 2 T - 1]`` by distance, and where keys and queries are.

    Positions of ``keys: [g or 1, rows, m]`` and ``queries: [rows, b]``, seen by ``heads: [g]``.
    """

    line: torch.Tensor
    heads: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor

    def places(self, skipped: int, count: int) -> torch.Tensor:
        """Where in the flat line the biases of ``count`` queries of each row lie: ``[g, rows, count, m]``."""
        length, queries = self.line.shape[1], self.queries[:, skipped : skipped + count]
        return self.heads.view(-1, 1, 1, 1) * length + self.keys[:, :, None, :] - queries[:, :, None] + length // 2


class Operands(NamedTuple):
    """One slab's part of the buffers: n = B * H * rows items, b queries and m keys each."""

    queries: torch.Tensor  # [n, b, D]
    keys: torch.Tensor  # [n, m, D], as values
    values: torch.Tensor
    scores: torch.Tensor  # flat
    bias: Biases | None = None
    blocks: tuple[torch.Tensor, ...] = ()  # of keys and of values, whole: [n * columns, b * D]


class _Scratch:
    """Buffers that every slab uses again. Slabs of one form, all but the first and the last, share their operands."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, line: torch.Tensor | None):
        self.plan, (self.B, self.H, self.T, self.D) = plan, q.shape
        self.line = line
        self.q, self.keys, self.values = q, self.by_block(k), self.by_block(v)
        self.slabs, self.ends = list(slabs(plan)), list(ends(plan, self.B, self.H, self.T))
        rows = max(slab.columns.shape[1] for slab in self.slabs)
        blocks = self.B * self.H * max(slab.columns[0].numel() for slab in self.slabs)
        self.queries = q.new_empty(self.B * self.H * rows * plan.size * self.D)
        self.seen_keys, self.seen_values = (q.new_empty(blocks, plan.size * self.D) for _ in range(2))
        of_end = self.ends[0].queries * self.T
        self.scores = q.new_empty(max(of_end, blocks * plan.size * min(plan.size, SLAB)))
        self.first = torch.arange(self.B * self.H, device=q.device).view(self.B, self.H, 1, 1) * plan.num_blocks
        self.of_q = self.by_slab(q, self.queries)
        self.indices = [(self.first + slab.columns).view(-1) for slab in self.slabs]
        self._operands: dict[torch.Size, Operands] = {}

    def by_block(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, T, D]`` as ``[B * H * num_blocks, size * D]``; what the last block lacks is never read."""
        plan = self.plan
        blocks = x.new_empty(self.B, self.H, plan.num_blocks * plan.size, self.D)
        blocks[:, :, : self.T] = x
        return blocks.view(-1, plan.size * self.D)

    def by_slab(self, x: torch.Tensor, buffer: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The rows of each slab in ``x: [B, H, T, D]`` and in a flat buffer, both ``[B, H, rows, b, D]``: views."""
        b = self.plan.size
        between = x[:, :, : (self.plan.num_blocks - 1) * b].unflatten(2, (-1, b))
        rows = [between[:, :, slab.rows] for slab in self.slabs]
        return [(there, buffer[: there.numel()].view(there.shape)) for there in rows]

    def load(self, i: int) -> Operands:
        """Copy the queries of slab i and gather the blocks they see."""
        form = self.slabs[i].columns.shape[1:]
        if form not in self._operands:
            self._operands[form] = self._cut(*form)
        part, (queries, place) = self._operands[form], self.of_q[i]
        place.copy_(queries)
        for blocks, buffer in zip((self.keys, self.values), part.blocks, strict=True):
            torch.index_select(blocks, 0, self.indices[i], out=buffer)
        return part if self.line is None else part._replace(bias=self._biases(self.slabs[i]))

    def _cut(self, rows: int, columns: int) -> Operands:
        n, b, D = self.B * self.H * rows, self.plan.size, self.D
        m = self.T - (self.plan.num_blocks - columns) * b
        blocks = tuple(a[: n * columns] for a in (self.seen_keys, self.seen_values))
        keys, values = (a.view(n, columns * b, D)[:, :m] for a in blocks)
        return Operands(self.queries[: n * b * D].view(n, b, D), keys, values, self.scores, blocks=blocks)

    def _biases(self, slab: Slab) -> Biases:
        assert self.line is not None
        b, device = self.plan.size, self.q.device
        inside = torch.arange(b, device=device)
        tokens = (slab.columns[:, :, :, None] * b + inside).flatten(2)
        rows = torch.arange(self.plan.num_blocks, device=device)[slab.rows]
        heads = torch.arange(self.H, device=device)
        keys = tokens[:, :, : self.T - (self.plan.num_blocks - slab.columns.shape[2]) * b]
        return Biases(self.line, heads, keys, rows[:, None] * b + inside)

    def load_end(self, end: End) -> Operands:
        """Copy some queries of the global rows; their keys are all keys."""
        keys, values = (self.by_token(blocks, end.part) for blocks in (self.keys, self.values))
        bias = None
        if self.line is not None:
            everywhere = torch.arange(self.T, device=self.q.device)
            heads = torch.arange(self.H, device=self.q.device).expand(self.B, -1)[end.part].flatten()
            queries = torch.cat([everywhere[tokens] for tokens in end.tokens])
            bias = Biases(self.line, heads, everywhere.view(1, 1, -1), queries[None])
        return Operands(read_end(self.q, end), keys, values, self.scores, bias)

    def by_token(self, blocks: torch.Tensor, part: Part) -> torch.Tensor:
        """Some heads of the matrix of all blocks as ``[g, T, D]``, a view."""
        return blocks.view(self.B, self.H, -1, self.D)[part.rows, part.heads, : self.T].flatten(0, 1)


def read_end(x: torch.Tensor, end: End) -> torch.Tensor:
    """Copy an end's tokens of ``x: [B, H, T, D]``: ``[g, c, D]``."""
    there = x[end.part]
    return torch.cat([there[:, :, tokens] for tokens in end.tokens], dim=2).flatten(0, 1)


def write_end(x: torch.Tensor, rows: torch.Tensor, end: End) -> None:
    """Copy such rows back."""
    there = x[end.part]
    by_head = rows.view(*there.shape[:2], *rows.shape[1:])
    for tokens, part in zip(end.tokens, by_head.split([a.stop - a.start for a in end.tokens], dim=2), strict=True):
        there[:, :, tokens] = part


def probabilities(query: torch.Tensor, slab: Operands, skipped: int = 0) -> torch.Tensor:
    """Softmax of some queries ``[n, c, D]`` over their keys: ``[n, c, m]``, in the scores' buffer.

    ``skipped`` queries of each row come before them.
    """
    n, c, D = query.shape
    m = slab.keys.shape[1]
    scores = slab.scores[: n * c * m].view(n, c, m)
    if slab.bias is not None:
        places = slab.bias.places(skipped, c)
        scores.view(-1, *places.shape).copy_(slab.bias.line.take(places))
    scores.baddbmm_(query, slab.keys.transpose(1, 2), beta=0 if slab.bias is None else 1, alpha=D**-0.5)
    return torch.softmax(scores, dim=2, out=scores)


class Blocks(torch.autograd.Function):
    """All rows, where there are any between the first and the last."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, line: torch.Tensor | None
    ) -> torch.Tensor:
        B, H, T, D = q.shape
        ctx.save_for_backward(q, k, v, line)
        ctx.plan = plan
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        scratch = _Scratch(q, k, v, plan, line)
        for end in scratch.ends:
            part = scratch.load_end(end)
            write_end(out, part.queries.baddbmm_(probabilities(part.queries, part), part.values, beta=0), end)
        for i, (rows, place) in enumerate(scratch.by_slab(out, scratch.queries)):
            part = scratch.load(i)
            for piece, query in enumerate(part.queries.split(SLAB, dim=1)):
                query.baddbmm_(probabilities(query, part, piece * SLAB), part.values, beta=0)
            rows.copy_(place)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        (q, k, v, line), plan = ctx.saved_tensors, ctx.plan
        dq, sums = torch.empty_like(q), _Sums(_Scratch(q, k, v, plan, line), ctx.needs_input_grad[4])
        sums.add_ends(grad, dq)
        sums.add_slabs(grad, dq)
        dkeys, dvalues, dline = sums.dkeys, sums.dvalues, sums.dline
        del sums
        dk = _by_token(dkeys, k)
        del dkeys
        return dq, dk, _by_token(dvalues, v), None, None if dline is None else dline.to(q.dtype)


class _Sums:
    """Gradients of keys and values, summed in at least single precision: every row adds to the global blocks."""

    def __init__(self, scratch: _Scratch, of_line: bool):
        self.scratch = scratch
        self.wide = torch.promote_types(scratch.keys.dtype, torch.float32)
        self.dkeys, self.dvalues = (torch.zeros_like(scratch.keys, dtype=self.wide) for _ in range(2))
        self.dscores = torch.empty_like(scratch.scores)
        self.dline = (
            scratch.line.new_zeros(scratch.line.shape, dtype=self.wide)
            if of_line and scratch.line is not None
            else None
        )

    def add_ends(self, grad: torch.Tensor, dq: torch.Tensor) -> None:
        """The global rows; their part of ``dq`` is written."""
        scratch = self.scratch
        product = scratch.keys.new_empty(math.prod(scratch.by_token(scratch.keys, scratch.ends[0].part).shape))
        for end in scratch.ends:
            part, dout = scratch.load_end(end), read_end(grad, end)
            columns = product[: part.keys.numel()].view(part.keys.shape)
            self._add(part, part.queries, dout, columns, functools.partial(self._add_end, end, columns))
            write_end(dq, dout, end)

    def _add_end(self, end: End, columns: torch.Tensor, total: torch.Tensor) -> None:
        self.scratch.by_token(total, end.part).add_(columns)

    def add_slabs(self, grad: torch.Tensor, dq: torch.Tensor) -> None:
        """All other rows; their part of ``dq`` is written."""
        scratch = self.scratch
        drows, product = torch.empty_like(scratch.queries), torch.zeros_like(scratch.seen_keys)
        of_grad, of_dq = (scratch.by_slab(x, drows) for x in (grad, dq))
        for i, index in enumerate(scratch.indices):
            part, (rows, place) = scratch.load(i), of_grad[i]
            drow = place.copy_(rows).flatten(0, 2)
            blocks = product[: len(index)]
            n, m, D = part.keys.shape
            columns = blocks.view(n, -1, D)[:, :m]
            add = functools.partial(self._add_blocks, index, blocks)
            pieces = zip(part.queries.split(SLAB, dim=1), drow.split(SLAB, dim=1), strict=True)
            for piece, (query, dout) in enumerate(pieces):
                self._add(part, query, dout, columns, add, piece * SLAB)
            of_dq[i][0].copy_(place)

    def _add_blocks(self, index: torch.Tensor, blocks: torch.Tensor, total: torch.Tensor) -> None:
        total.index_add_(0, index, blocks.to(self.wide))

    def _add(
        self, part: Operands, query: torch.Tensor, dout: torch.Tensor, columns: torch.Tensor,
        add: Callable[[torch.Tensor], None], skipped: int = 0,
    ) -> None:  # fmt: skip
        """Add what some queries give keys and values, by way of ``columns``; ``dout`` becomes the queries' own."""
        p, scale = probabilities(query, part, skipped), query.shape[2] ** -0.5
        columns.baddbmm_(p.transpose(1, 2), dout, beta=0)
        add(self.dvalues)
        ds = self.dscores[: p.numel()].view(p.shape).baddbmm_(dout, part.values.transpose(1, 2), beta=0)
        torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
        if self.dline is not None and part.bias is not None:
            places = part.bias.places(skipped, query.shape[1])
            above = ds.view(-1, *places.shape).sum(dim=0, dtype=self.wide)
            self.dline.view(-1).index_add_(0, places.flatten(), above.flatten())
        columns.baddbmm_(ds.transpose(1, 2), query, beta=0, alpha=scale)
        add(self.dkeys)
        dout.baddbmm_(ds, part.keys, beta=0, alpha=scale)


def _by_token(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gradients by block, laid out like another tensor."""
    B, H, T, D = like.shape
    return torch.empty_like(like).copy_(blocks.view(B, H, -1, D)[:, :, :T])
