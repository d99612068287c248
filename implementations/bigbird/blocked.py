"""Gathered blocks in slabs: dense products without any mask, and no more than one slab's scores in either pass.

Keys and values are copied once so that a block is one row of a matrix. A slab is a few blocks of queries, or a piece of
one where it is long; the blocks its rows see are gathered side by side, and since every row of a slab sees equally
many, the slab is one batched product.
The two global rows are dense attention over the whole sequence, the two rows next to them, which see one block less, a
slab of their own. Only the last block may be shorter; every list ends with it, so the gathered keys are cut there and
every executed pair is a visible one. The backward pass computes the probabilities again, as fused kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations.bigbird.layer import Plan

SLAB = 256  # queries whose scores are alive together


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape."""
    if plan.num_blocks <= 2:
        return scaled_dot_product_attention(q, k, v)
    last = (plan.num_blocks - 1) * plan.size
    ends = scaled_dot_product_attention(torch.cat((q[:, :, : plan.size], q[:, :, last:]), dim=2), k, v)
    return _Between.apply(q, k, v, ends, plan)


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


class Operands(NamedTuple):
    """One slab's part of the buffers: n = B * H * rows items, b queries and m keys each."""

    queries: torch.Tensor  # [n, b, D]
    keys: torch.Tensor  # [n, m, D], as values
    values: torch.Tensor
    scores: torch.Tensor  # flat, of at least n * min(b, SLAB) * m elements
    index: torch.Tensor  # [n * columns], rows of the matrix of all blocks


class _Scratch:
    """Buffers that every slab uses again."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan):
        self.plan, (self.B, self.H, self.T, self.D) = plan, q.shape
        self.q, self.keys, self.values = q, self.by_block(k), self.by_block(v)
        self.slabs = list(slabs(plan))
        rows = max(slab.columns.shape[1] for slab in self.slabs)
        blocks = self.B * self.H * max(slab.columns[0].numel() for slab in self.slabs)
        self.queries = q.new_empty(self.B * self.H * rows * plan.size * self.D)
        self.seen_keys, self.seen_values = (q.new_empty(blocks, plan.size * self.D) for _ in range(2))
        self.scores = q.new_empty(blocks * plan.size * min(plan.size, SLAB))
        self.first = torch.arange(self.B * self.H, device=q.device).view(self.B, self.H, 1, 1) * plan.num_blocks

    def by_block(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, H, T, D]`` as ``[B * H * num_blocks, size * D]``; what the last block lacks is never read."""
        plan = self.plan
        blocks = x.new_zeros(self.B, self.H, plan.num_blocks * plan.size, self.D)
        blocks[:, :, : self.T] = x
        return blocks.view(-1, plan.size * self.D)

    def load(self, slab: Slab) -> Operands:
        """Copy the queries of a slab and gather the blocks they see."""
        b, D, columns = self.plan.size, self.D, slab.columns.shape[2]
        index = (self.first + slab.columns).flatten()
        n = index.numel() // columns
        m = (columns - 1) * b + self.T - (self.plan.num_blocks - 1) * b
        queries = self.rows(self.q, self.queries, slab, write=False)
        seen = []
        for blocks, buffer in ((self.keys, self.seen_keys), (self.values, self.seen_values)):
            gathered = torch.index_select(blocks, 0, index, out=buffer[: index.numel()])
            seen.append(gathered.view(n, columns * b, D)[:, :m])
        return Operands(queries, *seen, self.scores, index)

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


def probabilities(query: torch.Tensor, slab: Operands) -> torch.Tensor:
    """Softmax of some queries ``[n, c, D]`` over their keys: ``[n, c, m]``, in the scores' buffer."""
    n, c, D = query.shape
    m = slab.keys.shape[1]
    scores = slab.scores[: n * c * m].view(n, c, m)
    scores.baddbmm_(query, slab.keys.transpose(1, 2), beta=0, alpha=D**-0.5)
    return torch.softmax(scores, dim=2, out=scores)


class _Between(torch.autograd.Function):
    """All rows between the first and the last; ``ends: [B, H, ., D]`` becomes those two."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, plan: Plan
    ) -> torch.Tensor:
        B, H, T, D = q.shape
        ctx.save_for_backward(q, k, v)
        ctx.plan = plan
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        out[:, :, : plan.size] = ends[:, :, : plan.size]
        out[:, :, (plan.num_blocks - 1) * plan.size :] = ends[:, :, plan.size :]
        scratch = _Scratch(q, k, v, plan)
        for slab in scratch.slabs:
            part = scratch.load(slab)
            for query in part.queries.split(SLAB, dim=1):
                query.baddbmm_(probabilities(query, part), part.values, beta=0)
            scratch.rows(out, scratch.queries, slab, write=True)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        (q, k, v), plan = ctx.saved_tensors, ctx.plan
        scratch = _Scratch(q, k, v, plan)
        drows, dscores = torch.empty_like(scratch.queries), torch.empty_like(scratch.scores)
        product = torch.zeros_like(scratch.seen_keys)
        dq = torch.zeros_like(q)
        # Every row adds to the global blocks, several to each other block: sum in at least single precision.
        wide = torch.promote_types(q.dtype, torch.float32)
        dkeys, dvalues = (torch.zeros_like(scratch.keys, dtype=wide) for _ in range(2))
        scale = q.shape[3] ** -0.5
        for slab in scratch.slabs:
            part = scratch.load(slab)
            drow = scratch.rows(grad, drows, slab, write=False)
            blocks = product[: part.index.numel()]
            columns = blocks.view(part.keys.shape[0], -1, part.keys.shape[2])[:, : part.keys.shape[1]]
            for query, dout in zip(part.queries.split(SLAB, dim=1), drow.split(SLAB, dim=1), strict=True):
                p = probabilities(query, part)
                columns.baddbmm_(p.transpose(1, 2), dout, beta=0)
                dvalues.index_add_(0, part.index, blocks.to(wide))
                ds = dscores[: p.numel()].view(p.shape).baddbmm_(dout, part.values.transpose(1, 2), beta=0)
                torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
                columns.baddbmm_(ds.transpose(1, 2), query, beta=0, alpha=scale)
                dkeys.index_add_(0, part.index, blocks.to(wide))
                dout.baddbmm_(ds, part.keys, beta=0, alpha=scale)
            scratch.rows(dq, drows, slab, write=True)
        del scratch, product, drows, dscores, part, drow, query, dout, blocks, columns, p, ds
        dk = _by_token(dkeys, k)
        del dkeys
        dv = _by_token(dvalues, v)
        ends = (slice(None, plan.size), slice((plan.num_blocks - 1) * plan.size, None))
        return dq, dk, dv, torch.cat([grad[:, :, end] for end in ends], dim=2), None


def _by_token(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of ``by_block``, laid out like another tensor."""
    B, H, T, D = like.shape
    return torch.empty_like(like).copy_(blocks.view(B, H, -1, D)[:, :, :T])
