"""Clusters of whole causal sequences: those of nearly one size are padded to one length and attended together.

What pads a cluster stands behind its last token: nobody sees it, and what it would see is not read.
B batch, H heads, T tokens, D head width; n clusters of a batch, M tokens of its largest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ctxbench.implementations.routing import tiles

ALIKE = 0.8  # of the largest cluster of a batch: smaller ones wait for the next, since padding is multiplied too


class Batch(NamedTuple):
    """Some clusters: ``rows: [n, M]`` of all rows, and where each stands in the order."""

    rows: torch.Tensor
    places: list[tuple[int, int]]

    def hide(self, padded: torch.Tensor) -> torch.Tensor:
        """Zero behind each cluster's last token, ``[n, M, D]``, in place."""
        for cluster, (start, stop) in zip(padded, self.places, strict=True):
            cluster[stop - start :] = 0
        return padded

    def put(self, into: torch.Tensor, padded: torch.Tensor) -> None:
        """Write clusters ``[n, M, D]`` to their places in ``into: [B * H * T, D]``."""
        for cluster, (start, stop) in zip(padded, self.places, strict=True):
            into[start:stop] = cluster[: stop - start]


class Clusters:
    """Rows ``[B * H * T, D]`` in the order of their clusters, head by head."""

    def __init__(self, ids: torch.Tensor, num_clusters: int):
        B, H, T = ids.shape
        head = torch.arange(B * H, device=ids.device)[:, None]
        by_head = ids.flatten(0, 1)
        self.order = (by_head.argsort(dim=1, stable=True) + head * T).flatten()
        self.sizes = torch.bincount((by_head + head * num_clusters).flatten(), minlength=B * H * num_clusters)

    def batches(self) -> Iterator[Batch]:
        """All clusters that are not empty, the largest first."""
        starts = self.sizes.cumsum(0) - self.sizes
        falling, which = self.sizes.sort(descending=True)
        sizes, firsts = falling.tolist(), starts[which].tolist()
        first, end = 0, int((falling > 0).sum())
        while first < end:
            M = sizes[first]
            most = min(end, first + max(1, tiles.ALIVE // (tiles.TILE * M)))
            stop = next((i for i in range(first, most) if sizes[i] < ALIKE * M), most)
            places = [(firsts[i], firsts[i] + sizes[i]) for i in range(first, stop)]
            begin, last = torch.tensor(places, device=self.order.device)[:, :, None].unbind(1)
            index = torch.minimum(begin + torch.arange(M, device=self.order.device), last - 1)
            yield Batch(self.order[index], places)
            first = stop


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, num_clusters: int, exclude_self: bool
) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, ``ids: [B, H, T]``; result ``[B, H, T, D]``, stored token by token."""
    clusters = Clusters(ids, num_clusters)
    streams = [x.reshape(-1, x.shape[3]) for x in (q, k, v)]
    out = torch.empty_like(streams[0])
    for batch in clusters.batches():
        queries, keys, values = (gathered(x, batch.rows) for x in streams)
        mixed = torch.empty_like(queries)
        if exclude_self:
            mixed[:, 0] = values[:, 0]
        members, longest = queries.shape[:2]
        buffer = tiles.scratch(q, members, longest, longest)
        tiles.attend(*tiles.others(exclude_self, mixed, queries, keys, values), 1, buffer)
        batch.put(out, mixed)
    by_token = inverse(clusters.order).view(ids.shape).transpose(1, 2)  # [B, T, H]
    return out.index_select(0, by_token.flatten()).view(*by_token.shape, -1).transpose(1, 2)


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor,
    num_clusters: int, exclude_self: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries, keys and values for ``grad: [B, H, T, D]``."""
    clusters, wide = Clusters(ids, num_clusters), torch.promote_types(q.dtype, torch.float32)
    streams = [x.reshape(-1, x.shape[3]) for x in (grad, q, k, v)]
    totals = [torch.empty_like(streams[0]) for _ in range(3)]
    for batch in clusters.batches():
        dmixed, queries, keys, values = (gathered(x, batch.rows) for x in streams)
        batch.hide(dmixed)  # so that padding gives nothing to what it sees
        dqueries = torch.zeros_like(queries)
        dkeys, dvalues = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        _, *parts = tiles.others(exclude_self, dmixed, dqueries, dkeys, dvalues)
        n, M, _ = queries.shape
        buffers = tiles.scratch(q, n, M, M), tiles.scratch(q, n, M, M)
        tiles.attend_backward(parts, *tiles.others(exclude_self, dmixed, queries, keys, values), 1, buffers)
        if exclude_self:
            dvalues[:, 0] += dmixed[:, 0]
        for total, part in zip(totals, (dqueries, dkeys, dvalues), strict=True):
            batch.put(total, part)
    back = inverse(clusters.order)
    dq, dk, dv = (total.index_select(0, back).view(q.shape) for total in totals)
    return dq, dk, dv


def gathered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of ``x: [N, D]`` in the shape of their numbers: ``[*rows.shape, D]``."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, x.shape[1])


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes another; a gather is several times as fast as writing rows in an order."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
