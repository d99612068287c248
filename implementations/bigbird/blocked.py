"""Gathered blocks in slabs: dense products without any mask, and no more than one slab's scores in either pass.

Keys and values are copied once so that a block is one row of a matrix. A slab is a few blocks of queries, or a piece of
one where it is long; the blocks its rows see are gathered side by side, and since every row of a slab sees equally
many, the slab is one batched product.
The two rows next to the ends see one block less and are a slab of their own. Queries of the two global rows meet all
keys, a few at a time. Only the last block may be shorter; every list ends with it, so the gathered keys are cut there
and every executed pair is a visible one. The backward pass computes the probabilities again, as fused kernels do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.bigbird.layer import Plan

SLAB = 256  # queries whose scores are alive together
END = 64  # queries of a global row whose scores are alive together


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, position: Position | None = None
) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape."""
    if not isinstance(position, Bias):
        return scaled_dot_product_attention(q, k, v) if plan.num_blocks <= 2 else _Blocks.apply(q, k, v, plan, None)
    if plan.num_blocks <= 2:
        return attend_slabs(q, k, v, causal=False, position=position)
    T = q.shape[2]
    return _Blocks.apply(q, k, v, plan, position.bias(torch.arange(1 - T, T, device=q.device), q.dtype))


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


def ends(plan: Plan, T: int) -> Iterator[slice]:
    """Every token of the first and of the last block, once."""
    for start, stop in ((0, plan.size), ((plan.num_blocks - 1) * plan.size, T)):
        for piece in range(start, stop, END):
            yield slice(piece, min(piece + END, stop))


class Biases(NamedTuple):
    """What is added to the scores of one slab: ``line: [H, 2 T - 1]`` by distance, and where keys and queries are.

    ``keys: [H or 1, rows, m]`` are positions, ``queries: [rows]`` those of each row's first query.
    """

    line: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor

    def places(self, skipped: int, count: int) -> torch.Tensor:
        """Where in the flat line the biases of ``count`` queries of each row lie: ``[H, rows, count, m]``."""
        heads, length = self.line.shape
        query = self.queries[:, None] + skipped + torch.arange(count, device=self.line.device)
        begin = torch.arange(heads, device=self.line.device).view(-1, 1, 1, 1) * length
        return begin + self.keys[:, :, None, :] - query[:, :, None] + length // 2


class Operands(NamedTuple):
    """One slab's part of the buffers: n = B * H * rows items, b queries and m keys each."""

    queries: torch.Tensor  # [n, b, D]
    keys: torch.Tensor  # [n, m, D], as values
    values: torch.Tensor
    scores: torch.Tensor  # flat
    bias: Biases | None


class _Scratch:
    """Buffers that every slab uses again."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, line: torch.Tensor | None):
        self.plan, (self.B, self.H, self.T, self.D) = plan, q.shape
        self.line = line
        self.q, self.keys, self.values = q, self.by_block(k), self.by_block(v)
        self.slabs = list(slabs(plan))
        rows = max(slab.columns.shape[1] for slab in self.slabs)
        blocks = self.B * self.H * max(slab.columns[0].numel() for slab in self.slabs)
        self.queries = q.new_empty(self.B * self.H * rows * plan.size * self.D)
        self.seen_keys, self.seen_values = (q.new_empty(blocks, plan.size * self.D) for _ in range(2))
        of_end = self.B * self.H * min(plan.size, END) * self.T
        self.scores = q.new_empty(max(of_end, blocks * plan.size * min(plan.size, SLAB)))
        self.first = torch.arange(self.B * self.H, device=q.device).view(self.B, self.H, 1, 1) * plan.num_blocks

    def by_block(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, T, D]`` as ``[B * H * num_blocks, size * D]``; what the last block lacks is never read."""
        plan = self.plan
        blocks = x.new_empty(self.B, self.H, plan.num_blocks * plan.size, self.D)
        blocks[:, :, : self.T] = x
        return blocks.view(-1, plan.size * self.D)

    def load(self, slab: Slab) -> tuple[Operands, torch.Tensor]:
        """Copy the queries of a slab and gather the blocks they see; the rows of those come second."""
        b, D, columns = self.plan.size, self.D, slab.columns.shape[2]
        index = (self.first + slab.columns).flatten()
        n = index.numel() // columns
        m = (columns - 1) * b + self.T - (self.plan.num_blocks - 1) * b
        queries = self.rows(self.q, self.queries, slab, write=False)
        seen = []
        for blocks, buffer in ((self.keys, self.seen_keys), (self.values, self.seen_values)):
            gathered = torch.index_select(blocks, 0, index, out=buffer[: index.numel()])
            seen.append(gathered.view(n, columns * b, D)[:, :m])
        bias = None
        if self.line is not None:
            tokens = slab.columns[:, :, :, None] * b + torch.arange(b, device=index.device)
            rows = torch.arange(self.plan.num_blocks, device=index.device)[slab.rows]
            bias = Biases(self.line, tokens.flatten(2)[:, :, :m], rows * b)
        return Operands(queries, seen[0], seen[1], self.scores, bias), index

    def load_end(self, tokens: slice) -> Operands:
        """Copy some queries of a global row; their keys are all keys."""
        keys, values = (self.by_token(blocks) for blocks in (self.keys, self.values))
        bias = None
        if self.line is not None:
            everywhere = torch.arange(self.T, device=self.q.device)
            bias = Biases(self.line, everywhere.view(1, 1, -1), everywhere[tokens.start : tokens.start + 1])
        return Operands(_copy(self.q, tokens), keys, values, self.scores, bias)

    def by_token(self, blocks: torch.Tensor) -> torch.Tensor:
        """The matrix of all blocks as ``[B * H, T, D]``, a view."""
        return blocks.view(self.B * self.H, -1, self.D)[:, : self.T]

    def rows(self, x: torch.Tensor, buffer: torch.Tensor, slab: Slab, write: bool) -> torch.Tensor:
        """A slab's rows of ``x: [B, H, T, D]``, copied into a buffer or, to ``write``, out of it: ``[n, b, D]``."""
        b = self.plan.size
        by_block = x[:, :, : (self.plan.num_blocks - 1) * b].unflatten(2, (-1, b))[:, :, slab.rows]
        place = buffer[: by_block.numel()].view(by_block.shape)
        if write:
            by_block.copy_(place)
        else:
            place.copy_(by_block)
        return place.view(-1, b, self.D)


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


def _copy(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """Some tokens of ``x: [B, H, T, D]`` as ``[B * H, c, D]``."""
    return x[:, :, tokens].clone(memory_format=torch.contiguous_format).flatten(0, 1)


class _Blocks(torch.autograd.Function):
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
        for tokens in ends(plan, T):
            part = scratch.load_end(tokens)
            rows = part.queries.baddbmm_(probabilities(part.queries, part), part.values, beta=0)
            out[:, :, tokens] = rows.view(B, H, -1, D)
        for slab in scratch.slabs:
            part, _ = scratch.load(slab)
            for piece, query in enumerate(part.queries.split(SLAB, dim=1)):
                query.baddbmm_(probabilities(query, part, piece * SLAB), part.values, beta=0)
            scratch.rows(out, scratch.queries, slab, write=True)
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
        columns = torch.empty_like(scratch.by_token(scratch.keys))

        def add(total: torch.Tensor) -> None:
            scratch.by_token(total).add_(columns)

        for tokens in ends(scratch.plan, scratch.T):
            part, dout = scratch.load_end(tokens), _copy(grad, tokens)
            self._add(part, part.queries, dout, columns, add)
            dq[:, :, tokens] = dout.view(scratch.B, scratch.H, -1, scratch.D)

    def add_slabs(self, grad: torch.Tensor, dq: torch.Tensor) -> None:
        """All other rows; their part of ``dq`` is written."""
        scratch = self.scratch
        drows, product = torch.empty_like(scratch.queries), torch.zeros_like(scratch.seen_keys)
        for slab in scratch.slabs:
            (part, index), drow = scratch.load(slab), scratch.rows(grad, drows, slab, write=False)
            blocks = product[: index.numel()]
            n, m, D = part.keys.shape
            columns = blocks.view(n, -1, D)[:, :m]
            add = functools.partial(self._add_blocks, index, blocks)
            pieces = zip(part.queries.split(SLAB, dim=1), drow.split(SLAB, dim=1), strict=True)
            for piece, (query, dout) in enumerate(pieces):
                self._add(part, query, dout, columns, add, piece * SLAB)
            scratch.rows(dq, drows, slab, write=True)

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
