"""Attention block by block and cluster by cluster: no more than a tile of scores is alive.

Local heads: fused attention, each block of queries against one copy of the blocks it sees; with a bias by distance,
which that adds to no score without keeping it, slabs of queries. ``topw``: all clusters are
equally large, so a few of them at a time are gathered and are one batched product a tile; ids ascend, so causality
inside a cluster is a triangle; the mean over a token's clusters gathers their results. ``strict``: clusters are as
large as the contents make them, see ``clusters``. Where a token does not see itself there is a triangle too: queries
from the second on against keys up to the last but one. All backward passes compute the probabilities again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations._shared.rows import Rows, head_by_head, rows_of, token_by_token
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations.routing import distances, tiles
from ctxbench.implementations.routing.clusters import attend as strict
from ctxbench.implementations.routing.layer import Operators, Rules
from ctxbench.implementations.routing.routing import taken_in_rounds
from ctxbench.implementations.routing.whole import gathered


def local(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, earlier: bool, position: Position
) -> torch.Tensor:
    """Split and joined, not sliced: the gradient of a slice is as long as what it was cut from."""
    T, S = q.shape[2], k.shape[2]
    ends = [min(end, S) for end in range(block * ((S - T) // block + 1), S + block, block)]
    sizes = [end - start for start, end in zip([S - T, *ends[:-1]], ends, strict=True)]
    keys, values = k.split(block, dim=2), v.split(block, dim=2)
    masks: dict[tuple[int, int], torch.Tensor] = {}  # at most three: kept for the backward pass
    outputs = []
    for queries, end in zip(q.split(sizes, dim=2), ends, strict=True):
        own = (end - 1) // block
        seen = slice(max(0, own - 1), own + (1 if earlier else 2))
        run_k, run_v = (torch.cat(pieces[seen], dim=2) for pieces in (keys, values))
        shape = queries.shape[2], run_k.shape[2]
        if isinstance(position, Bias):
            before = end - shape[0] - seen.start * block
            outputs.append(attend_slabs(queries, run_k, run_v, earlier, position, before=before))
            continue
        masked = earlier and 1 < shape[0] < shape[1]
        if masked and shape not in masks:
            masks[shape] = hidden_later(q, *shape)
        outputs.append(
            scaled_dot_product_attention(
                queries, run_k, run_v, masks[shape] if masked else None, is_causal=earlier and 1 < shape[0] == shape[1]
            )
        )
    return torch.cat(outputs, dim=2)


def hidden_later(like: torch.Tensor, rows: int, keys: int) -> torch.Tensor:
    """What is added to the scores of the last ``rows`` of so many tokens: minus infinity at later keys."""
    return torch.full((rows, keys), float("-inf"), dtype=like.dtype, device=like.device).triu(keys - rows + 1)


def topw(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """Some clusters at a time: gather, attend, add to the tokens they came from."""
    mixed: torch.Tensor = _Taken.apply(q, k, v, query_ids, key_ids, rules, distances.line_of(position, q, k))
    return mixed


class _Members:
    """Rows of queries and of keys by cluster, ``[B * H * K, w]``."""

    def __init__(self, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules):
        self.query_ids, self.key_ids = query_ids.flatten(0, 1), key_ids.flatten(0, 1)  # [B * H, K, w]
        self.size, self.without = query_ids.shape[3], rules.exclude_self
        self.count = self.query_ids.shape[:2].numel()
        self.step = max(1, tiles.ALIVE // (tiles.TILE * self.size))
        self.first = 1 if rules.earlier else None

    def numbers(self, rows: Rows, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Those of a few clusters at a time, ``[step, w]``."""
        return rows.number.at(ids).flatten(0, 1).split(self.step)

    def biases(self, line: torch.Tensor | None, T: int, gradient: torch.Tensor | None) -> Sequence[tiles.Biases | None]:
        """Where a few clusters at a time find their numbers, all in one line with one gradient."""
        if line is None:
            return [None] * -(-self.count // self.step)
        of_line = None if gradient is None else gradient.view(-1)
        met = (distances.of_queries(line, T, self.query_ids), self.key_ids)
        queries, keys = (x.flatten(0, 1).split(self.step) for x in met)
        return [tiles.Biases(line.view(-1), *pair, of_line) for pair in zip(queries, keys, strict=True)]

    def scratch(self, like: torch.Tensor) -> tiles.Scratch:
        """Room for the scores of a group's tile."""
        return tiles.scratch(like, min(self.step, self.count), self.size, self.size)


def _times(numbers: torch.Tensor, rows: int) -> torch.Tensor:
    """How many clusters took each row: ``[rows]``."""
    return numbers.new_zeros(rows).scatter_add_(0, numbers, torch.ones_like(numbers))


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        query_ids, key_ids, rules, line = rest
        ctx.save_for_backward(q, k, v, query_ids, key_ids, line)
        ctx.rules, shared = rules, q is k and query_ids is key_ids
        members, streams = _Members(query_ids, key_ids, rules), [rows_of(x) for x in ((q, v) if shared else (q, k, v))]
        room = tiles.Gathering([x.table for x in streams], members.size, members.first, members.without)
        chosen = (members.query_ids, *[members.key_ids] * (len(streams) - 1))
        met = zip(streams, chosen, strict=True)
        mixed = q.new_empty(members.query_ids.numel(), q.shape[3])
        groups = mixed.split(members.step * members.size)
        slots, begin, biases = [], 0, members.biases(line, q.shape[2], None)
        for out, added, *numbers in zip(groups, biases, *(members.numbers(*one) for one in met), strict=True):
            slots.append(room.attend(out, numbers, added).slots.flatten() + begin)
            begin += len(out)
        B, H, T, D = q.shape
        there = token_by_token(B, H, T, q.device).at(members.query_ids).flatten()
        order, times = there.argsort(stable=True), _times(there, B * H * T)
        # The mean over a token's clusters, 0 where it has none: no row is written more than once.
        mean = embedding_bag(torch.cat(slots)[order], mixed, times.cumsum(0) - times, mode="mean")
        return mean.view(B, T, H, D).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        q, k, v, query_ids, key_ids, line = ctx.saved_tensors
        members = _Members(query_ids, key_ids, ctx.rules)
        streams = [rows_of(x) for x in (grad, q, k, v)]
        of_queries, of_keys = (head_by_head(x).at(ids) for x, ids in ((q, members.query_ids), (k, members.key_ids)))
        there = of_queries.flatten()
        shares = _times(there, q.shape[:3].numel())[there].to(q.dtype).reciprocal_().view(-1, members.size, 1)
        wide = torch.promote_types(q.dtype, torch.float32)
        totals = [torch.zeros(x.shape, dtype=wide, device=x.device).flatten(0, 2) for x in (q, k, v)]
        buffers = members.scratch(q), members.scratch(q)
        met = zip(streams, (members.query_ids, members.query_ids, members.key_ids, members.key_ids), strict=True)
        numbers = (members.numbers(*one) for one in met)
        into = (x.flatten(0, 1).split(members.step) for x in (of_queries, of_keys))
        dline = distances.gradient_of(line, ctx.needs_input_grad[6])
        biases = members.biases(line, q.shape[2], dline)
        each = zip(shares.split(members.step), biases, *into, *numbers, strict=True)
        for share, added, query_rows, key_rows, *at in each:
            dmixed, queries, keys, values = (gathered(x.table, rows) for x, rows in zip(streams, at, strict=True))
            dmixed *= share
            dqueries = torch.zeros_like(queries)
            dkeys, dvalues = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
            _, *parts = tiles.others(members.without, dmixed, dqueries, dkeys, dvalues)
            operands = tiles.others(members.without, dmixed, queries, keys, values)
            tiles.attend_backward(parts, *operands, members.first, buffers, tiles.of_others(members.without, added))
            if members.without:
                dvalues[:, 0] += dmixed[:, 0]
            for total, rows, part in zip(
                totals, (query_rows, key_rows, key_rows), (dqueries, dkeys, dvalues), strict=True
            ):
                total.index_add_(0, rows.flatten(), part.flatten(0, 1).to(wide))
        dq, dk, dv = (total.to(x.dtype).view(x.shape) for total, x in zip(totals, (q, k, v), strict=True))
        return dq, dk, dv, None, None, None, None if dline is None else dline.to(q.dtype)


OPERATORS = Operators(local, strict, topw, taken=taken_in_rounds)
