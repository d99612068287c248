"""Clusters of whole causal sequences: those of nearly one size are padded to one length and attended together.

What pads a cluster stands behind its last token: nobody sees it, and what it would see is not read.
B batch, H heads, T tokens, D head width; n clusters of a batch, M tokens of its largest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ctxbench.implementations._shared.rows import rows_of
from ctxbench.implementations.routing import distances, tiles

ALIKE = 0.8  # of the largest cluster of a batch: smaller ones wait for the next, since padding is multiplied too
ALIGNED = 16  # tokens that padded clusters are a multiple of: rows of scores then begin at whole vectors


class Batch(NamedTuple):
    """Some clusters: positions ``[n, M]`` in the order, and where each cluster begins and ends there."""

    positions: torch.Tensor
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

    def biases(self, of_all: tiles.Biases | None) -> tiles.Biases | None:
        """Those of its clusters."""
        if of_all is None:
            return None
        return of_all._replace(queries=of_all.queries[self.positions], keys=of_all.keys[self.positions])

    def real(self) -> torch.Tensor:
        """Which positions pad nothing, ``[n, M]``."""
        rank = torch.arange(self.positions.shape[1], device=self.positions.device)
        sizes = torch.tensor([stop - start for start, stop in self.places], device=rank.device)
        return rank < sizes[:, None]


class Clusters:
    """Tokens in the order of their clusters, head by head: ``order: [B * H, T]``."""

    def __init__(self, ids: torch.Tensor, num_clusters: int):
        by_head = ids.flatten(0, 1)
        self.order = by_head.argsort(dim=1, stable=True)
        X = len(by_head)
        head = torch.arange(X, device=ids.device)[:, None]
        self.sizes = torch.bincount((by_head + head * num_clusters).flatten(), minlength=X * num_clusters)

    def batches(self) -> Iterator[Batch]:
        """All clusters that are not empty, the largest first."""
        starts = self.sizes.cumsum(0) - self.sizes
        falling, which = self.sizes.sort(descending=True)
        sizes, firsts = falling.tolist(), starts[which].tolist()
        first, end = 0, int((falling > 0).sum())
        while first < end:
            M = -(-sizes[first] // ALIGNED) * ALIGNED
            most = min(end, first + max(1, tiles.ALIVE // (tiles.TILE * M)))
            stop = next((i for i in range(first, most) if sizes[i] < ALIKE * sizes[first]), most)
            places = [(firsts[i], firsts[i] + sizes[i]) for i in range(first, stop)]
            begin, last = torch.tensor(places, device=self.order.device)[:, :, None].unbind(1)
            yield Batch(torch.minimum(begin + torch.arange(M, device=self.order.device), last - 1), places)
            first = stop

    def biases(self, line: torch.Tensor | None, gradient: torch.Tensor | None) -> tiles.Biases | None:
        """Where tokens in the order find their numbers, as queries and as keys, ``[B * H * T]`` each."""
        if line is None:
            return None
        queries = distances.of_queries(line, self.order.shape[1], self.order)
        of_line = None if gradient is None else gradient.view(-1)
        return tiles.Biases(line.view(-1), queries.flatten(), self.order.flatten(), of_line)

    def by_token(self) -> torch.Tensor:
        """Where each token stands in the order of all heads, ``[B * H * T]``."""
        head = torch.arange(len(self.order), device=self.order.device)[:, None]
        return inverse((self.order + head * self.order.shape[1]).flatten())


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, num_clusters: int, exclude_self: bool,
    line: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, ``ids: [B, H, T]``, ``line: [H, 2 T - 1]``; ``[B, H, T, D]``, by token."""
    clusters, streams = Clusters(ids, num_clusters), [rows_of(x) for x in ((q, v) if q is k else (q, k, v))]
    numbers, batches = [x.number.at(clusters.order).flatten() for x in streams], list(clusters.batches())
    room = tiles.Gathering([x.table for x in streams], batches[0].positions.shape[1], 1, exclude_self)
    mixed = q.new_empty(sum(batch.positions.numel() for batch in batches), q.shape[3])
    slots, begin, biases = [], 0, clusters.biases(line, None)
    for batch in batches:
        out = mixed[begin : begin + batch.positions.numel()]
        layout = room.attend(out, [number[batch.positions] for number in numbers], batch.biases(biases))
        slots.append(layout.slots.flatten() + begin)
        begin += len(out)
    real = torch.cat([batch.real().flatten() for batch in batches])
    found = torch.empty_like(numbers[0])
    found[torch.cat([batch.positions.flatten() for batch in batches])[real]] = torch.cat(slots)[real]
    by_token = found[clusters.by_token()].view(ids.shape).transpose(1, 2)  # [B, T, H]
    return mixed.index_select(0, by_token.flatten()).view(*by_token.shape, -1).transpose(1, 2)


def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor,
    num_clusters: int, exclude_self: bool, line: torch.Tensor | None, dline: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of queries, keys and values for ``grad: [B, H, T, D]``; that of the line is added to ``dline``."""
    clusters, wide = Clusters(ids, num_clusters), torch.promote_types(q.dtype, torch.float32)
    streams = [rows_of(x) for x in (grad, q, k, v)]
    numbers = [x.number.at(clusters.order).flatten() for x in streams]
    biases = clusters.biases(line, dline)
    totals = [torch.empty_like(q, memory_format=torch.contiguous_format).flatten(0, 2) for _ in range(3)]
    for batch in clusters.batches():
        dmixed, queries, keys, values = (
            gathered(x.table, number[batch.positions]) for x, number in zip(streams, numbers, strict=True)
        )
        batch.hide(dmixed)  # so that padding gives nothing to what it sees
        dqueries = torch.zeros_like(queries)
        dkeys, dvalues = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
        _, *parts = tiles.others(exclude_self, dmixed, dqueries, dkeys, dvalues)
        n, M, _ = queries.shape
        buffers = tiles.scratch(q, n, M, M), tiles.scratch(q, n, M, M)
        added = tiles.of_others(exclude_self, batch.biases(biases))
        tiles.attend_backward(parts, *tiles.others(exclude_self, dmixed, queries, keys, values), 1, buffers, added)
        if exclude_self:
            dvalues[:, 0] += dmixed[:, 0]
        for total, part in zip(totals, (dqueries, dkeys, dvalues), strict=True):
            batch.put(total, part)
    back = clusters.by_token()
    dq, dk, dv = (total.index_select(0, back).view(q.shape) for total in totals)
    return dq, dk, dv


def gathered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of ``x: [N, D]`` in the shape of their numbers: ``[*rows.shape, D]``."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, x.shape[1])


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes another; a gather is several times as fast as writing rows in an order."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
