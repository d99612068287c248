"""Attention by plain products, a slab of queries at a time, where a fused kernel is slow: on CPU in bf16.

PyTorch's fused kernel reaches a third of what the same products reach there. A slab's scores stay in the caches, so
that their softmax costs about as much as one product more. Causal slabs end at their last query. The backward pass
computes the probabilities again, as fused kernels do: five products for the forward two.

B batch, H heads, n queries, K keys, D head width. A part is some heads of some rows of the batch, g items in all; r
queries of a slab, m keys that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ctxbench.implementations._shared.staircase import BLOCK, SLAB


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, bias: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``, stored as ``[B, n, H, D]``.

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: the last query sees every key, and each one before it a key fewer; a query that sees none gets 0.
        bias: added to the scores, ``[H, n, K]``; it gets a gradient.
        scale: of the scores; ``D ** -0.5`` by default.
    """
    if causal and k.shape[2] < q.shape[2] - 1:
        raise ValueError(f"only the first query may see no key, received {q.shape[2]} queries and {k.shape[2]} keys")
    return _Products.apply(q, k, v, bias, causal, q.shape[3] ** -0.5 if scale is None else scale)


def everything(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same where every query sees every key."""
    return attend(q, k, v, causal=False)


class Slab(NamedTuple):
    """Queries ``begin .. end`` and the first ``keys`` keys, all that any of them sees."""

    begin: int
    end: int
    keys: int


class Part(NamedTuple):
    """Rows of the batch and heads that are computed together."""

    rows: slice
    heads: slice

    @property
    def items(self) -> int:
        """Heads of rows of the batch."""
        return (self.rows.stop - self.rows.start) * (self.heads.stop - self.heads.start)


def parts(B: int, H: int, fit: int) -> Iterator[Part]:
    """Cover a batch and its heads by at most ``fit`` items at a time; the first part is a largest one."""
    rows, heads = max(1, fit // H), min(H, fit)
    for row in range(0, B, rows):
        for head in range(0, H, heads):
            yield Part(slice(row, min(row + rows, B)), slice(head, min(head + heads, H)))


class _Scratch:
    """Buffers that every part and slab use again."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool, scale: float
    ):
        self.q, self.k, self.v, self.bias, self.causal, self.scale = q, k, v, bias, causal, scale
        B, H, n, D = q.shape
        K, r = k.shape[2], min(n, BLOCK)
        self.parts = list(parts(B, H, max(1, SLAB // max(1, r * K))))  # whose scores stay in a cache
        g = self.parts[0].items
        self.keys, self.values = q.new_empty(g * K * D), q.new_empty(g * K * D)
        self.queries, self.scores = q.new_empty(g * r * D), q.new_empty(g * r * K)
        self.future = q.new_full((r, r), -math.inf).triu_(1) if causal else None

    def slabs(self) -> Iterator[Slab]:
        """Cover the queries."""
        n, K = self.q.shape[2], self.k.shape[2]
        for begin in range(0, n, BLOCK):
            end = min(begin + BLOCK, n)
            yield Slab(begin, end, K - n + end if self.causal else K)

    def seen(self, part: Part, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a slab, ``[g, m, D]``: a fused kernel reads heads where they are, products copy them."""
        if slab.begin and not self.causal:  # as in the slab before
            shape = (part.items, slab.keys, self.q.shape[3])
            return self.keys[: math.prod(shape)].view(shape), self.values[: math.prod(shape)].view(shape)
        keys = slice(slab.keys)
        return copied(self.k[:, :, keys], part, self.keys), copied(self.v[:, :, keys], part, self.values)

    def probabilities(self, query: torch.Tensor, keys: torch.Tensor, part: Part, slab: Slab) -> torch.Tensor:
        """Softmax of ``query: [g, r, D]`` over the keys of a slab: ``[g, r, m]``, in the scores' buffer."""
        g, r, _ = query.shape
        scores = self.scores[: g * r * slab.keys].view(g, r, slab.keys)
        if self.bias is not None:
            tile = self.bias[part.heads, slab.begin : slab.end, : slab.keys]
            scores.view(g // len(tile), *tile.shape).copy_(tile)
        scores.baddbmm_(query, keys.transpose(1, 2), beta=int(self.bias is not None), alpha=self.scale)
        if self.future is not None:
            m = min(r, slab.keys)
            scores[:, :, slab.keys - m :].add_(self.future[:r, r - m : r])
        torch.softmax(scores, dim=2, out=scores)
        if self.causal and slab.begin == 0 and slab.keys < slab.end:
            scores[:, 0] = 0  # it sees no key
        return scores


def copied(x: torch.Tensor, part: Part, buffer: torch.Tensor) -> torch.Tensor:
    """A part of ``x: [B, H, t, D]`` in a flat buffer: ``[g, t, D]``."""
    there = x[part.rows, part.heads]
    return buffer[: there.numel()].view(there.shape).copy_(there).flatten(0, 1)


class _Products(torch.autograd.Function):
    """Slab after slab, part after part."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, bias)
        ctx.causal, ctx.scale = causal, scale
        B, H, n, D = q.shape
        out = q.new_empty(B, n, H, D).transpose(1, 2)
        scratch = _Scratch(q, k, v, bias, causal, scale)
        for part in scratch.parts:
            for slab in scratch.slabs():
                rows, (keys, values) = slice(slab.begin, slab.end), scratch.seen(part, slab)
                query = copied(q[:, :, rows], part, scratch.queries)
                p = scratch.probabilities(query, keys, part, slab)
                query.baddbmm_(p, values, beta=0)
                there = out[part.rows, part.heads, rows]
                there.copy_(query.view(there.shape))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        q, k, v, bias = ctx.saved_tensors
        scratch, scale = _Scratch(q, k, v, bias, ctx.causal, ctx.scale), ctx.scale
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Every slab adds to the keys: sum in at least single precision.
        wide = torch.promote_types(q.dtype, torch.float32)
        dbias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[3] else None
        dkeys, dvalues = (torch.empty_like(scratch.keys, dtype=wide) for _ in range(2))
        product, drows, dscores = (torch.empty_like(a) for a in (scratch.keys, scratch.queries, scratch.scores))
        for part in scratch.parts:
            there = [into[part.rows, part.heads] for into in (dk, dv)]
            to_keys, to_values = (
                total[: place.numel()].view(place.shape).flatten(0, 1).zero_()
                for total, place in zip((dkeys, dvalues), there, strict=True)
            )
            for slab in scratch.slabs():
                rows, (keys, values) = slice(slab.begin, slab.end), scratch.seen(part, slab)
                query, dout = copied(q[:, :, rows], part, scratch.queries), copied(grad[:, :, rows], part, drows)
                p = scratch.probabilities(query, keys, part, slab)
                columns = product[: keys.numel()].view(keys.shape)
                to_values[:, : slab.keys] += columns.baddbmm_(p.transpose(1, 2), dout, beta=0)
                ds = dscores[: p.numel()].view(p.shape).baddbmm_(dout, values.transpose(1, 2), beta=0)
                torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
                if dbias is not None:
                    tile = dbias[part.heads, rows, : slab.keys]
                    tile += ds.view(len(ds) // len(tile), *tile.shape).sum(dim=0, dtype=wide)
                to_keys[:, : slab.keys] += columns.baddbmm_(ds.transpose(1, 2), query, beta=0, alpha=scale)
                dout.baddbmm_(ds, keys, beta=0, alpha=scale)
                place = dq[part.rows, part.heads, rows]
                place.copy_(dout.view(place.shape))
            for place, total in zip(there, (to_keys, to_values), strict=True):
                place.copy_(total.view(place.shape))
        return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype), None, None
