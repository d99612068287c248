"""Attention block by block and cluster by cluster: no more than a tile of scores is alive.

Local heads: fused attention, each block of queries against one copy of the blocks it sees. ``topw``: all clusters are
equally large, so a few of them at a time are gathered and are one batched product a tile; ids ascend, so causality
inside a cluster is a triangle. ``strict``: clusters are as large as the contents make them, see ``clusters``. Where a
token does not see itself there is a triangle too: queries from the second on against keys up to the last but one. All
backward passes compute the probabilities again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations.routing import tiles
from ctxbench.implementations.routing.clusters import attend as strict
from ctxbench.implementations.routing.layer import Operators, Rules
from ctxbench.implementations.routing.routing import taken_in_rounds
from ctxbench.implementations.routing.whole import gathered


def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, earlier: bool) -> torch.Tensor:
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules
) -> torch.Tensor:
    """Some clusters at a time: gather, attend, add to the tokens they came from."""
    mixed: torch.Tensor = _Taken.apply(q, k, v, query_ids, key_ids, rules)
    return mixed


class _Members:
    """Rows of queries and of keys by cluster, numbered through the batch: ``[B * H * K, w]``."""

    def __init__(self, T: int, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules):
        B, H, _, w = query_ids.shape
        first = torch.arange(B * H, device=query_ids.device).view(B, H, 1, 1) * T
        self.query_rows, self.key_rows = ((ids + first).flatten(0, 2) for ids in (query_ids, key_ids))
        self.size, self.rules = w, rules
        self.step = max(1, tiles.ALIVE // (tiles.TILE * w))
        self.first = 1 if rules.earlier else None

    def groups(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of the queries and of the keys of a few clusters."""
        return zip(self.query_rows.split(self.step), self.key_rows.split(self.step), strict=True)

    def scratch(self, like: torch.Tensor) -> tiles.Scratch:
        """Room for the scores of a group's tile."""
        return tiles.scratch(like, min(self.step, len(self.key_rows)), self.size, self.size)

    def times(self, like: torch.Tensor) -> torch.Tensor:
        """Clusters that took each row of ``like: [B * H * T, D]``, at least 1: ``[B * H * T, 1]``."""
        rows = self.query_rows.flatten()
        return like.new_zeros(len(like), 1).index_add_(0, rows, like.new_ones(len(rows), 1)).clamp_(min=1)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        query_ids, key_ids, rules = rest
        ctx.save_for_backward(q, k, v, query_ids, key_ids)
        ctx.rules = rules
        members = _Members(q.shape[2], query_ids, key_ids, rules)
        q_rows, k_rows, v_rows = (x.reshape(-1, x.shape[3]) for x in (q, k, v))
        total, buffer = torch.zeros_like(q_rows), members.scratch(q)
        for query_rows, key_rows in members.groups():
            queries, keys, values = (
                gathered(x, at) for x, at in ((q_rows, query_rows), (k_rows, key_rows), (v_rows, key_rows))
            )
            mixed = torch.empty_like(queries)
            if rules.exclude_self:
                mixed[:, 0] = values[:, 0]
            tiles.attend(*tiles.others(rules.exclude_self, mixed, queries, keys, values), members.first, buffer)
            total.index_add_(0, query_rows.flatten(), mixed.flatten(0, 1))
        return total.div_(members.times(total)).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        q, k, v, query_ids, key_ids = ctx.saved_tensors
        members = _Members(q.shape[2], query_ids, key_ids, ctx.rules)
        q_rows, k_rows, v_rows, grad_rows = (x.reshape(-1, x.shape[3]) for x in (q, k, v, grad))
        grad_rows = grad_rows / members.times(grad_rows)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q_rows, k_rows, v_rows))
        buffers = members.scratch(q), members.scratch(q)
        for query_rows, key_rows in members.groups():
            dmixed, queries = gathered(grad_rows, query_rows), gathered(q_rows, query_rows)
            keys, values = gathered(k_rows, key_rows), gathered(v_rows, key_rows)
            dqueries = torch.zeros_like(queries)
            dkeys, dvalues = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
            without = ctx.rules.exclude_self
            _, *parts = tiles.others(without, dmixed, dqueries, dkeys, dvalues)
            met = tiles.others(without, dmixed, queries, keys, values)
            tiles.attend_backward(parts, *met, members.first, buffers)
            if without:
                dvalues[:, 0] += dmixed[:, 0]
            for total, rows, part in ((dq, query_rows, dqueries), (dk, key_rows, dkeys), (dv, key_rows, dvalues)):
                total.index_add_(0, rows.flatten(), part.flatten(0, 1).to(wide))
        dq, dk, dv = (total.to(x.dtype).view(x.shape) for total, x in ((dq, q), (dk, k), (dv, v)))
        return dq, dk, dv, None, None, None


OPERATORS = Operators(local, strict, topw, taken=taken_in_rounds)
