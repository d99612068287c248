"""Attention inside clusters of unequal size, as one operator: how much it executes depends on the contents.

A loop whose extents are values cannot be traced, so the loop is inside ``torch.ops.ctxbench.clustered_attention`` and
the operator has a formula: the pairs of equally full clusters, the least that any contents need and what training the
centroids aims at. What really runs is ``routing.visited_pairs``, at worst all pairs. Tokens are sorted by cluster,
stably, so each cluster is one run of rows in their own order and its mask is a triangle. The queries are the last of
the keys, so those of a cluster are the last rows of its run. Where no query has earlier keys, as in a whole sequence,
clusters are not taken one by one, see ``whole``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.routing import distances, tiles, whole
from ctxbench.implementations.routing.layer import Rules
from ctxbench.implementations.routing.routing import balanced_pairs
from ctxbench.implementations.routing.whole import inverse


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, ids ``[B, H, T]`` and ``[B, H, S]``; result ``[B, H, T, D]``."""
    mixed: torch.Tensor = _Clusters.apply(q, k, v, query_ids, key_ids, rules, distances.line_of(position, q, k))
    return mixed


class _Clusters(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        query_ids, key_ids, rules, line = rest
        ctx.save_for_backward(q, k, v, query_ids, key_ids, line)
        ctx.rules = rules
        out: torch.Tensor = torch.ops.ctxbench.clustered_attention(q, k, v, query_ids, key_ids, *rules, line)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *operands, line = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6]
        dq, dk, dv, dline = torch.ops.ctxbench.clustered_attention_backward(
            *gradients, *operands, *ctx.rules, line, wanted
        )
        return dq, dk, dv, None, None, None, dline if wanted else None


class Run(NamedTuple):
    """One cluster of one head: its rows among the sorted queries and keys.

    Attributes:
        first: keys that the first query sees; None where all queries see all keys.
        alone: the first query of the cluster may see nothing but itself, and is not among ``queries``.
    """

    queries: slice
    keys: slice
    first: int | None
    alone: bool

    def cut(self, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tiles.Operands:
        """This run of sorted results, queries, keys and values, as a batch of one."""
        return out[None, self.queries], q[None, self.queries], k[None, self.keys], v[None, self.keys]

    def biases(self, of_head: tiles.Biases | None) -> tiles.Biases | None:
        """This run of a head's."""
        if of_head is None:
            return None
        return of_head._replace(queries=of_head.queries[None, self.queries], keys=of_head.keys[None, self.keys])


def _run(queries: slice, keys: slice, earlier: bool, exclude_self: bool) -> Run:
    rows, n = queries.stop - queries.start, keys.stop - keys.start
    alone = exclude_self and rows == n
    if alone:  # a triangle too: the second query sees the first key
        return Run(slice(queries.start + 1, queries.stop), keys, 1, True)
    return Run(queries, keys, n - rows + 1 - exclude_self if earlier else None, False)


class _Head:
    """Order of the rows of one head of one batch item, and its runs."""

    runs: list[Run]

    def __init__(self, query_ids: torch.Tensor, key_ids: torch.Tensor, num_clusters: int, earlier: bool, without: bool):
        if len(query_ids) == 1:  # a decoded token: nothing else needs an order
            self.key_order = (key_ids == query_ids).nonzero()[:, 0]
            self.query_order = torch.zeros_like(self.key_order[:1])
            self.runs = [_run(slice(0, 1), slice(0, len(self.key_order)), earlier, without)]
            return
        self.key_order = key_ids.argsort(stable=True)
        whole = len(query_ids) == len(key_ids)
        self.query_order = self.key_order if whole else query_ids.argsort(stable=True)
        sizes = torch.bincount(key_ids, minlength=num_clusters).tolist()
        counts = sizes if whole else torch.bincount(query_ids, minlength=num_clusters).tolist()
        self.runs = []
        query = key = 0
        for rows, size in zip(counts, sizes, strict=True):
            if rows:
                self.runs.append(_run(slice(query, query + rows), slice(key, key + size), earlier, without))
            query, key = query + rows, key + size

    def biases(
        self, head: int, line: torch.Tensor | None, T: int, gradient: torch.Tensor | None
    ) -> tiles.Biases | None:
        """Where sorted queries ``[T]`` and keys find the numbers of this head."""
        if line is None:
            return None
        of_head = None if gradient is None else gradient[head]
        return tiles.Biases(line[head], T - 1 - self.query_order, self.key_order, of_head)

    def scratch(self, like: torch.Tensor) -> tiles.Scratch:
        """Room for the scores of the largest tile."""
        return tiles.scratch(like, 1, tiles.TILE, max(run.keys.stop - run.keys.start for run in self.runs))


def _heads(query_ids: torch.Tensor, key_ids: torch.Tensor, *rules: Any) -> Iterator[tuple[int, int, _Head]]:
    for b in range(query_ids.shape[0]):
        for h in range(query_ids.shape[1]):
            yield b, h, _Head(query_ids[b, h], key_ids[b, h], *rules)


@torch.library.custom_op("ctxbench::clustered_attention", mutates_args=())
def clustered_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor,
    num_clusters: int, earlier: bool, exclude_self: bool, line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Result ``[B, H, T, D]``, stored token by token; ``line: [H, T + S - 1]``, see ``distances``."""
    if earlier and q.shape[2] == k.shape[2] > 1:
        return whole.attend(q, k, v, key_ids, num_clusters, exclude_self, line)
    out = _empty(q)
    for b, h, head in _heads(query_ids, key_ids, num_clusters, earlier, exclude_self):
        queries = q[b, h].index_select(0, head.query_order)
        keys, values = (x[b, h].index_select(0, head.key_order) for x in (k, v))
        buffer = head.scratch(q)
        mixed, biases = torch.empty_like(queries), head.biases(h, line, q.shape[2], None)
        for run in head.runs:
            if run.alone:
                mixed[run.queries.start - 1] = values[run.keys.start]
            tiles.attend(*run.cut(mixed, queries, keys, values), run.first, buffer, run.biases(biases))
        out[b, h] = mixed.index_select(0, inverse(head.query_order))
    return out


@torch.library.custom_op("ctxbench::clustered_attention_backward", mutates_args=())
def clustered_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor,
    key_ids: torch.Tensor, num_clusters: int, earlier: bool, exclude_self: bool, line: torch.Tensor | None = None,
    wanted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, and of the line: empty unless it is ``wanted``."""
    dline = distances.gradient_of(line, wanted)
    if earlier and q.shape[2] == k.shape[2] > 1:
        found = whole.attend_backward(grad, q, k, v, key_ids, num_clusters, exclude_self, line, dline)
        return *found, _rounded(dline, q)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    for b, h, head in _heads(query_ids, key_ids, num_clusters, earlier, exclude_self):
        dmixed, queries = (x[b, h].index_select(0, head.query_order) for x in (grad, q))
        keys, values = (x[b, h].index_select(0, head.key_order) for x in (k, v))
        sorted_dq = torch.zeros_like(queries)
        sorted_dk, sorted_dv = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        buffers, biases = (head.scratch(q), head.scratch(q)), head.biases(h, line, q.shape[2], dline)
        for run in head.runs:
            _, *gradients = run.cut(dmixed, sorted_dq, sorted_dk, sorted_dv)
            met = run.cut(dmixed, queries, keys, values)
            tiles.attend_backward(gradients, *met, run.first, buffers, run.biases(biases))
            if run.alone:
                sorted_dv[run.keys.start] += dmixed[run.queries.start - 1]
        dq[b, h] = sorted_dq.index_select(0, inverse(head.query_order))
        for total, part in ((dk, sorted_dk), (dv, sorted_dv)):  # a decoded token meets some of the keys only
            total[b, h].index_copy_(0, head.key_order, part.to(total.dtype))
    return dq, dk, dv, _rounded(dline, q)


def _rounded(dline: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    """What an operator returns in place of None is empty."""
    return q.new_empty(0) if dline is None else dline.to(q.dtype)


def _empty(q: torch.Tensor) -> torch.Tensor:
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


@clustered_attention.register_fake
def _(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return _empty(q)


@clustered_attention_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor,
    key_ids: torch.Tensor, num_clusters: int, earlier: bool, exclude_self: bool, line: torch.Tensor | None = None,
    wanted: bool = False,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    dline = q.new_empty(0 if line is None or not wanted else line.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dline


@formula(torch.ops.ctxbench.clustered_attention)
def nominal_flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor,
    num_clusters: int, earlier: bool, exclude_self: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Scores and values of the queries' pairs in equally full clusters."""
    B, H, T, D = q.shape
    S = k.shape[2]
    pairs = balanced_pairs(S, num_clusters, earlier) - balanced_pairs(S - T, num_clusters, earlier)
    return 4 * B * H * D * (pairs - T * exclude_self)


@formula(torch.ops.ctxbench.clustered_attention_backward)
def nominal_backward_flops(grad: torch.Tensor, *arguments: Any, **_: Any) -> int:
    """Five products where the forward pass has two."""
    return nominal_flops(*arguments) * 5 // 2
