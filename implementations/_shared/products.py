"""Attention by plain products, a slab of queries at a time, where a fused kernel is slow: on CPU in bf16.

PyTorch's fused kernel reaches a third of what the same products reach there. A slab's scores stay in the caches, so
that their softmax costs about as much as one product more. Causal slabs end at their last query. The backward pass
computes the probabilities again, as fused kernels do: five products for the forward two. A loop over segments keeps
its buffers from call to call: new ones would lie elsewhere, in memory that no cache knows.

B batch, H heads, n queries, K keys, D head width. A part is some heads of some rows of the batch, g items in all; r
queries of a slab, m keys that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ctxbench.implementations._shared.placed import Placed, add_gradient, biases
from ctxbench.implementations._shared.products_table import Plan, Slab, plan


class Rule(NamedTuple):
    """Which keys a query sees, and the scale of the scores."""

    causal: bool
    strict: bool
    scale: float


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True, bias: torch.Tensor | None = None,
    scale: float | None = None, strict: bool = False, first: torch.Tensor | None = None, placed: Placed | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``, stored as ``[B, n, H, D]``.

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: the last query sees every key, and each one before it a key fewer.
        bias: added to the scores, ``[H, n, K]``; it gets a gradient. Where causal, it also hides what is not seen, by
            minus infinity.
        scale: of the scores; ``D ** -0.5`` by default.
        strict: no query sees its own key, the last of those it would see, which a bias has to hide. A query that sees
            none gets 0.
        first: scores of the first keys, ``[N]``, in place of their products with any query; no gradient.
        placed: the bias of the first P keys, which lie elsewhere in every row of the batch; all queries see them, and
            ``bias`` is that of the other K - P.
    """
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"every query has a key of its own, received {q.shape[2]} queries and {k.shape[2]} keys")
    if strict and not (causal and bias is not None):
        raise ValueError("only a bias of causal attention can hide the queries' own keys: give one, or strict=False")
    rule = Rule(causal, strict, q.shape[3] ** -0.5 if scale is None else scale)
    if placed is not None and bias is None:
        raise ValueError("the keys behind those that are placed need a bias too")
    kept = _KEPT.get()
    arena, future = (None, None) if kept is None else kept.buffers(_Sizes.of(q, k, rule), q, causal and bias is None)
    return _Products.apply(q, k, v, bias, first, *(placed or (None, None, 0)), arena, future, rule)


def hiding_later_keys(bias: torch.Tensor) -> torch.Tensor:
    """A bias ``[H, n, K]`` in place as causal ``attend`` takes it: the last query sees every key."""
    n, K = bias.shape[1:]
    future = torch.ones(n, K, dtype=torch.bool, device=bias.device).triu_(K - n + 1)
    return bias.masked_fill_(future, -math.inf)


def everything(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same where every query sees every key."""
    return attend(q, k, v, causal=False)


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Within it, calls that ask for no gradient share buffers, which live until it ends and grow to what is needed."""
    token = _KEPT.set(None if torch.is_grad_enabled() else _Kept())
    try:
        yield
    finally:
        _KEPT.reset(token)


@dataclass
class _Kept:
    """What the calls of a loop share: buffers in one piece, and what hides later keys."""

    arena: torch.Tensor | None = None
    future: torch.Tensor | None = None

    def buffers(self, sizes: _Sizes, like: torch.Tensor, masked: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The buffers, of the dtype and device of another tensor, and a mask where it is needed."""
        if self.arena is None or self.arena.numel() < sizes.total or self.arena.dtype is not like.dtype:
            self.arena = None
            self.arena = like.new_empty(sizes.total)
        if masked and (self.future is None or len(self.future) < sizes.rows or self.future.dtype is not like.dtype):
            self.future = None
            self.future = hidden(sizes.rows, like)
        return self.arena, self.future if masked else None


_KEPT: ContextVar[_Kept | None] = ContextVar("buffers of products", default=None)


class _Sizes(NamedTuple):
    """Elements of the buffers, and rows of the longest slab."""

    plan: Plan
    keys: int
    queries: int
    scores: int
    rows: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, rule: Rule) -> _Sizes:
        """Of queries ``[B, H, n, D]`` and keys ``[B, H, K, D]``."""
        B, H, n, D = q.shape
        K = k.shape[2]
        made = plan(H, n, K, rule.causal)
        g, r = next(parts(B, H, made.fit)).items, made.longest
        return cls(made, g * K * D, g * r * D, g * r * K, r)

    @property
    def total(self) -> int:
        """Keys, values, queries and scores."""
        return 2 * self.keys + self.queries + self.scores


class Part(NamedTuple):
    """Rows of the batch and heads that are computed together."""

    rows: slice
    heads: slice

    @property
    def items(self) -> int:
        """Heads of rows of the batch."""
        return (self.rows.stop - self.rows.start) * (self.heads.stop - self.heads.start)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Its share of ``x: [B, H, t, D]``."""
        return x[self.rows, self.heads]


def parts(B: int, H: int, fit: int) -> Iterator[Part]:
    """Cover a batch and its heads by at most ``fit`` items at a time; the first part is a largest one."""
    rows, heads = max(1, fit // H), min(H, fit)
    for row in range(0, B, rows):
        for head in range(0, H, heads):
            yield Part(slice(row, min(row + rows, B)), slice(head, min(head + heads, H)))


class _Scratch:
    """Buffers that every part and slab use again."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, first: torch.Tensor | None,
        placed: Placed | None, rule: Rule, arena: torch.Tensor | None = None, future: torch.Tensor | None = None,
    ):  # fmt: skip
        self.bias, self.first, self.placed, self.rule = bias, first, placed, rule
        self.ahead = 0 if placed is None else placed.places.shape[1]
        (self.cuts, fit), *counts, r = sizes = _Sizes.of(q, k, rule)
        self.parts = list(parts(q.shape[0], q.shape[1], fit))
        arena = q.new_empty(sizes.total) if arena is None else arena[: sizes.total]
        self.keys, self.values, self.queries, self.scores = arena.split([counts[0], *counts])
        self.future = future
        if future is None and rule.causal and bias is None:
            self.future = hidden(r, q)

    def seen(self, k: torch.Tensor, v: torch.Tensor, slab: Slab) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a part's keys and values those of a slab, ``[g, m, D]``; a fused kernel reads heads where they are."""
        if slab.begin and not self.rule.causal:  # as in the slab before
            form = (k.shape[0] * k.shape[1], *k.shape[2:])
            return shaped(self.keys, form), shaped(self.values, form)
        m = slab.keys
        return copied(k[:, :, :m], self.keys), copied(v[:, :, :m], self.values)

    def probabilities(self, query: torch.Tensor, keys: torch.Tensor, part: Part, slab: Slab) -> torch.Tensor:
        """Softmax of ``query: [g, r, D]`` over the keys of a slab: ``[g, r, m]``, in the scores' buffer."""
        g, r, m = query.shape[0], query.shape[1], slab.keys
        scores, biased = shaped(self.scores, (g, r, m)), self.bias is not None
        if self.bias is not None:
            behind, front = self.by_head(scores, part)
            behind.copy_(self.bias[part.heads, slab.begin : slab.end, : m - self.ahead])
            if self.placed is not None:
                front.copy_(biases(self.of(part, slab), r, scores.dtype))
        scores.baddbmm_(query, keys.transpose(1, 2), beta=int(biased), alpha=self.rule.scale)
        if self.future is not None:
            scores[:, :, m - r :].add_(self.future[:r, :r])
        if self.first is not None:
            scores[:, :, : len(self.first)] = self.first
        torch.softmax(scores, dim=2, out=scores)
        if self.rule.strict and slab.begin == 0 and m == r:  # nothing comes before the first query
            scores[:, 0] = 0
        return scores

    def by_head(self, scores: torch.Tensor, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``[g, r, m]`` of keys behind those that are placed, ``[b, h, r, m - P]``, and of these."""
        whole = scores.view(-1, part.heads.stop - part.heads.start, *scores.shape[1:])
        return whole[..., self.ahead :], whole[..., : self.ahead]

    def of(self, part: Part, slab: Slab) -> Placed:
        """What is placed, for a part and the queries from a slab's first on."""
        assert self.placed is not None
        bias, places, first = self.placed
        return Placed(bias[part.heads], places[part.rows], first + slab.begin)


def hidden(rows: int, like: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of a slab and its own keys, ``[rows, rows]``."""
    return like.new_full((rows, rows), -math.inf).triu_(1)


def shaped(buffer: torch.Tensor, form: tuple[int, ...]) -> torch.Tensor:
    """The head of a flat buffer as a contiguous tensor."""
    return buffer[: math.prod(form)].view(form)


def copied(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """``x: [b, h, t, D]`` in a flat buffer: ``[g, t, D]``."""
    return shaped(buffer, x.shape).copy_(x).flatten(0, 1)


class _Products(torch.autograd.Function):
    """Slab after slab, part after part."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
        first: torch.Tensor | None, compact: torch.Tensor | None, places: torch.Tensor | None, begin: int,
        arena: torch.Tensor | None, future: torch.Tensor | None, rule: Rule,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, bias, first, compact, places)
        ctx.rule, ctx.begin = rule, begin
        placed = None if compact is None or places is None else Placed(compact, places, begin)
        B, H, n, D = q.shape
        out = q.new_empty(B, n, H, D).transpose(1, 2)
        scratch = _Scratch(q, k, bias, first, placed, rule, arena, future)
        for part in scratch.parts:
            asking, known, told, answers = (part.of(x) for x in (q, k, v, out))
            for slab in scratch.cuts:
                keys, values = scratch.seen(known, told, slab)
                there = answers[:, :, slab.begin : slab.end]
                query = copied(asking[:, :, slab.begin : slab.end], scratch.queries)
                query.baddbmm_(scratch.probabilities(query, keys, part, slab), values, beta=0)
                there.copy_(query.view(there.shape))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        q, k, v, bias, first, compact, places = ctx.saved_tensors
        placed = None if compact is None else Placed(compact, places, ctx.begin)
        scratch, scale = _Scratch(q, k, bias, first, placed, ctx.rule), ctx.rule.scale
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Every slab adds to the keys: sum in at least single precision.
        wide = torch.promote_types(q.dtype, torch.float32)
        dbias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[3] else None
        dtable = torch.zeros_like(compact) if ctx.needs_input_grad[5] else None
        dkeys, dvalues = (torch.empty_like(scratch.keys, dtype=wide) for _ in range(2))
        product, drows, dscores = (torch.empty_like(a) for a in (scratch.keys, scratch.queries, scratch.scores))
        for part in scratch.parts:
            asking, known, told, above, to_query, to_key, to_value = (part.of(x) for x in (q, k, v, grad, dq, dk, dv))
            by_key, by_value = (
                shaped(total, place.shape).flatten(0, 1).zero_()
                for total, place in ((dkeys, to_key), (dvalues, to_value))
            )
            for slab in scratch.cuts:
                rows, (keys, values) = slice(slab.begin, slab.end), scratch.seen(known, told, slab)
                query, dout = copied(asking[:, :, rows], scratch.queries), copied(above[:, :, rows], drows)
                p = scratch.probabilities(query, keys, part, slab)
                columns = shaped(product, keys.shape)
                by_value[:, : slab.keys] += columns.baddbmm_(p.transpose(1, 2), dout, beta=0)
                ds = shaped(dscores, p.shape).baddbmm_(dout, values.transpose(1, 2), beta=0)
                torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
                if first is not None:
                    ds[:, :, : len(first)] = 0
                behind, front = scratch.by_head(ds, part)
                if dbias is not None:
                    tile = dbias[part.heads, rows, : slab.keys - scratch.ahead]
                    tile += behind.sum(dim=0, dtype=wide)
                if dtable is not None:
                    add_gradient(dtable[part.heads], scratch.of(part, slab), front)
                by_key[:, : slab.keys] += columns.baddbmm_(ds.transpose(1, 2), query, beta=0, alpha=scale)
                dout.baddbmm_(ds, keys, beta=0, alpha=scale)
                place = to_query[:, :, rows]
                place.copy_(dout.view(place.shape))
            for place, total in ((to_key, by_key), (to_value, by_value)):
                place.copy_(total.view(place.shape))
        return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype), None, dtable, *[None] * 5
