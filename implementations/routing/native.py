"""Clusters as ranges of sorted tokens, in C++: what is gathered is attended to where it lies, without a tile of scores.

``strict``: tokens stand in the order of their clusters, and a query sees its own cluster, up to itself where earlier
tokens alone are to be seen. ``topw``: all clusters are equally large, so each is a sequence of a batch.

B batch, H heads, T tokens, D head width, K clusters of w tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding_bag

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import ranges_native
from ctxbench.implementations._shared.lines import PLAIN, SLOPE, SLOPES, TABLE, Placed
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.ranges import Line, Range, attend
from ctxbench.implementations._shared.rows import head_by_head, rows_of, token_by_token
from ctxbench.implementations.routing.clusters import nominal_flops
from ctxbench.implementations.routing.layer import Operators, Rules
from ctxbench.implementations.routing.routing import taken_in_rounds
from ctxbench.implementations.routing.whole import inverse


def local(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, earlier: bool, position: Position
) -> torch.Tensor:
    """The keys from the block before the query's: a range that moves in steps of a block."""
    before, end = Line(block, block, base=-block), Line(base=1) if earlier else Line(block, block, base=2 * block)
    keys = Range(k, v, before, end, start=0)
    return attend(q, [keys], offset=k.shape[2] - q.shape[2], bias=position.compact())[0]


def strict(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """Whole sequences: queries and keys are the same tokens."""
    mixed: torch.Tensor = _sorted(q, k, v, query_ids, key_ids, *rules, compact(position, q))
    return mixed


@torch.library.custom_op("ctxbench::sorted_attention", mutates_args=())
def _sorted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor,
    num_clusters: int, earlier: bool, exclude_self: bool, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, ids ``[B, H, T]``; result ``[B, H, T, D]``, stored token by token."""
    B, H, T, D = q.shape
    order = key_ids.argsort(dim=2, stable=True)
    ids = key_ids.gather(2, order)
    query, key, value = (_gathered(x, order.flatten(0, 1)).view(B, H, T, D) for x in (q, k, v))
    begins = torch.searchsorted(ids, ids, out_int32=True)
    ends = None if earlier else torch.searchsorted(ids, ids, right=True, out_int32=True)
    places = None if bias is None else order.int()
    out = _attend(query, key, value, bias, exclude_self, begins, ends, places, places)
    if exclude_self:  # the first of a cluster has nobody else
        alone = begins == torch.arange(T, device=q.device)
        out[alone] = value[alone]
    back = inverse(head_by_head(q).at(order.flatten(0, 1)).flatten()).view(B, H, T).transpose(1, 2)
    return out.flatten(0, 2).index_select(0, back.flatten()).view(B, T, H, D).transpose(1, 2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, exclude_self: bool,
    *tables: torch.Tensor | None, earlier: bool = True,
) -> torch.Tensor:  # fmt: skip
    """The shared kernel on rows that stand anywhere; ``tables`` are the last of what describes a range there."""
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    kind = PLAIN if bias is None else SLOPES if bias.dim() == 1 else TABLE
    seen = Placed(SLOPE, 1 - exclude_self, 1, 1) if earlier else Placed()
    farthest = bias.shape[1] // 2 if kind == TABLE and bias is not None else 0
    one = key, value, 1, Placed(), seen, kind, 1, 0, None, *tables
    ranges_native.attend(query, out, lse, bias, [one], farthest, query.shape[3] ** -0.5)
    return out


def compact(position: Position, like: torch.Tensor) -> torch.Tensor | None:
    """Slopes ``[H]`` or a table by distance ``[H, 2 F + 1]`` as the kernel reads them."""
    bias = position.compact()
    return None if bias is None else bias.to(torch.promote_types(like.dtype, torch.float32)).contiguous()


@_sorted.register_fake
def _(q: torch.Tensor, *_: Any) -> torch.Tensor:
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


formula(torch.ops.ctxbench.sorted_attention)(nominal_flops)


def _gathered(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of ``x: [B, H, T, D]`` at ``tokens: [B * H, ...]`` of their heads, ``[rows, D]``."""
    rows = rows_of(x)
    return rows.table.index_select(0, rows.number.at(tokens).flatten())


@torch.library.custom_op("ctxbench::taken_attention", mutates_args=())
def _taken(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor,
    bias: torch.Tensor, earlier: bool, exclude_self: bool,
) -> torch.Tensor:  # fmt: skip
    """Members ``[B, X, w, D]`` of X clusters each, at tokens ``[B, X, w]``; ``bias``: of each cluster."""
    return _attend(query, key, value, bias, exclude_self, None, None, query_ids, key_ids, earlier=earlier)


@_taken.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


@formula(torch.ops.ctxbench.taken_attention)
def _taken_flops(query: torch.Tensor, key: Any, value: Any, query_ids: Any, key_ids: Any, bias: Any,
                 earlier: bool, exclude_self: bool, **_: Any) -> int:  # fmt: skip
    """All clusters are equally full, so the count is exact."""
    B, X, w, D = query.shape
    return 4 * B * X * D * (w * (w + 1) // 2 - w * exclude_self if earlier else w * w)


def topw(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """Ids ascend, so causality inside a cluster is a triangle; a token gets the mean over its clusters."""
    B, H, T, D = q.shape
    members, (K, w), bias = query_ids.flatten(0, 1), query_ids.shape[2:], compact(position, q)
    query = _gathered(q, members).view(-1, 1, w, D)
    key, value = (_gathered(x, key_ids.flatten(0, 1)).view(-1, 1, w, D) for x in (k, v))
    if bias is None:
        seen = Line(base=1 - rules.exclude_self) if rules.earlier else None
        mixed = attend(query, [Range(key, value, high=seen)])[0]
    else:
        by_cluster = (x.view(B, H * K, w, D) for x in (query, key, value))
        places = (ids.flatten(1, 2).int() for ids in (query_ids, key_ids))
        rest = bias.repeat_interleave(K, dim=0), rules.earlier, rules.exclude_self
        mixed = _taken(*by_cluster, *places, *rest).view(query.shape)
    if rules.exclude_self:
        mixed[:, :, 0] = value[:, :, 0]
    there = token_by_token(B, H, T, q.device).at(members).flatten()
    times = there.new_zeros(B * H * T).scatter_add_(0, there, torch.ones_like(there))
    order = there.argsort(stable=True)
    mean = embedding_bag(order, mixed.view(-1, D), times.cumsum(0) - times, mode="mean")  # 0 where it has none
    return mean.view(B, T, H, D).transpose(1, 2)


OPERATORS = Operators(local, strict, topw, taken=taken_in_rounds)
