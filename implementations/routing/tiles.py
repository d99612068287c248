"""Attention of runs of queries against runs of keys, a tile of queries at a time; no more than its scores are alive.

A tile meets every key that one of its queries sees, so its softmax is complete and the backward pass can compute it
again from queries and keys alone. n runs at once, R queries and M keys each, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

TILE = 64  # queries a tile: larger ones multiply more masked pairs, smaller ones cost more calls
ALIVE = 1 << 18  # scores that are alive together where runs are equally long: a megabyte in single precision


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # results, queries, keys, values


def others(exclude_self: bool, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Operands:
    """What meets where run and queries are the same tokens; without a token itself the first query is left out."""
    return (out[:, 1:], q[:, 1:], k[:, :-1], v[:, :-1]) if exclude_self else (out, q, k, v)


class Biases(NamedTuple):
    """What is added to the scores of runs of tokens that lie anywhere: to each pair its number of a line.

    Attributes:
        line: by distance, of one head after the other, flat.
        queries, keys: ``[n, R]`` and ``[n, M]``, whose sum is where a pair finds its number.
        gradient: receives that of the line, at least in single precision; None where nobody wants it.
    """

    line: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    gradient: torch.Tensor | None = None

    def read(self, tile: Tile, scores: torch.Tensor) -> None:
        """Write the numbers of all pairs of a tile."""
        torch.index_select(self.line, 0, self._places(tile), out=scores.view(-1))

    def add_gradient(self, tile: Tile, scores: torch.Tensor) -> None:
        """Add the scores' gradient to that of the line."""
        if self.gradient is not None:
            self.gradient.scatter_add_(0, self._places(tile), scores.flatten().to(self.gradient.dtype))

    def _places(self, tile: Tile) -> torch.Tensor:
        return (self.queries[:, tile.rows, None] + self.keys[:, None, : tile.keys]).flatten()


def of_others(exclude_self: bool, biases: Biases | None) -> Biases | None:
    """Those of the :func:`others`."""
    if biases is None or not exclude_self:
        return biases
    return biases._replace(queries=biases.queries[:, 1:], keys=biases.keys[:, :-1])


class Tile(NamedTuple):
    """Queries ``rows`` against the first ``keys`` keys; ``corner``: the first of them that is masked, None: none is."""

    rows: slice
    keys: int
    corner: int | None


def tiles(R: int, M: int, first: int | None) -> Iterator[Tile]:
    """Tiles of one run whose query t sees its first ``first + t`` keys, or all of them."""
    for start in range(0, R, TILE):
        stop = min(start + TILE, R)
        if first is None:
            yield Tile(slice(start, stop), M, None)
        else:
            yield Tile(slice(start, stop), first + stop - 1, first + start)


class Scratch(NamedTuple):
    """Room for the scores of any tile, flat, and what is added to those of a corner; used again and again."""

    scores: torch.Tensor
    hidden: torch.Tensor


def scratch(like: torch.Tensor, runs: int, R: int, M: int) -> Scratch:
    """For so many runs of at most R queries and M keys."""
    rows = min(R, TILE)
    return Scratch(like.new_empty(runs * rows * M), like.new_full((rows, rows), float("-inf")).triu_())


class Layout:
    """Results of ``runs`` runs of ``length`` tokens, one tile after the other, so that a product writes in one piece.

    Where the first token of a run sees nothing else (``alone``), it is a tile of its own. ``slots: [runs, length]``
    says where each token stands.
    """

    def __init__(self, runs: int, length: int, alone: bool, device: torch.device):
        starts = [0, *range(1, length, TILE)] if alone else [*range(0, length, TILE)]
        spans = [(start, stop - start) for start, stop in zip(starts, [*starts[1:], length], strict=True)]
        self.runs, self.sizes = runs, [runs * span for _, span in spans]
        run, tokens = torch.arange(runs, device=device)[:, None], torch.arange(length, device=device)
        self.slots = torch.cat([runs * start + run * span + tokens[:span] for start, span in spans], dim=1)

    def cut(self, out: torch.Tensor) -> list[torch.Tensor]:
        """Tiles ``[runs, span, D]`` of ``out: [runs * length, D]``."""
        return [part.view(self.runs, -1, part.shape[1]) for part in out.split(self.sizes)]


class Attention:
    """Attention of ``q: [n, R, D]`` to ``k, v: [n, M, D]``; views are made once, for operands that are filled again."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int | None, buffer: Scratch):
        self.scale = q.shape[2] ** -0.5
        self.tiles = [
            (tile, q[:, tile.rows], k[:, : tile.keys].transpose(1, 2), v[:, : tile.keys], *_scores(q, tile, buffer))
            for tile in tiles(q.shape[1], k.shape[1], first)
        ]

    def into(self, out: Iterable[torch.Tensor], biases: Biases | None) -> None:
        """Write the tiles of the result, ``[n, span, D]`` each."""
        for (tile, query, key, value, p, corner, hidden), result in zip(self.tiles, out, strict=True):
            if biases is not None:
                biases.read(tile, p)
            p.baddbmm_(query, key, beta=0 if biases is None else 1, alpha=self.scale)
            if hidden is not None:
                corner.add_(hidden)
            torch.softmax(p, dim=2, out=p)
            torch.bmm(p, value, out=result)  # in one piece: else the product would go through n one after the other


class Gathering:
    """Runs gathered from tables ``[N, D]`` into the same room, which stays in caches.

    ``tables``: of queries, keys and values, or of what is both query and key and of values.
    """

    def __init__(self, tables: Sequence[torch.Tensor], longest: int, first: int | None, alone: bool):
        rows = max(longest, ALIVE // TILE)
        self.tables, self.first, self.alone = tables, first, alone
        self.rooms = [table.new_empty(rows, table.shape[1]) for table in self.tables]
        self.buffer = scratch(tables[0], 1, TILE, rows)
        self.plans: dict[tuple[int, int], tuple[list[torch.Tensor], Attention, Layout]] = {}

    def attend(self, out: torch.Tensor, numbers: Sequence[torch.Tensor], biases: Biases | None) -> Layout:
        """Results ``out: [runs * length, D]`` of runs whose rows have these numbers, ``[runs, length]`` a table."""
        runs, length = numbers[0].shape
        if (runs, length) not in self.plans:
            self.plans[runs, length] = self._plan(runs, length)
        gathered, attention, layout = self.plans[runs, length]
        for table, number, into in zip(self.tables, numbers, gathered, strict=True):
            torch.index_select(table, 0, number.flatten(), out=into.flatten(0, 1))
        results = layout.cut(out)
        if self.alone:
            results.pop(0).copy_(gathered[-1][:, :1])
        attention.into(results, of_others(self.alone, biases))
        return layout

    def _plan(self, runs: int, length: int) -> tuple[list[torch.Tensor], Attention, Layout]:
        gathered = [room[: runs * length].view(runs, length, -1) for room in self.rooms]
        q, k, v = gathered if len(gathered) == 3 else (gathered[0], *gathered)
        met = (q[:, 1:], k[:, :-1], v[:, :-1]) if self.alone else (q, k, v)
        layout = Layout(runs, length, self.alone, q.device)
        return gathered, Attention(*met, self.first, self.buffer), layout


def attend(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int | None, buffer: Scratch,
    biases: Biases | None,
) -> None:  # fmt: skip
    """Write the result of one run, ``q: [1, R, D]``, ``k, v: [1, M, D]``, into ``out: [1, R, D]``."""
    Attention(q, k, v, first, buffer).into(out.split(TILE, dim=1) if q.shape[1] else (), biases)


def attend_backward(
    gradients: Sequence[torch.Tensor], dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, first: int | None, buffers: tuple[Scratch, Scratch], biases: Biases | None,
) -> None:  # fmt: skip
    """Write ``dq`` and add to ``dk`` and ``dv``; five products where the forward pass has two."""
    dq, dk, dv = gradients
    scale = q.shape[2] ** -0.5
    for tile in tiles(q.shape[1], k.shape[1], first):
        rows, seen = tile.rows, slice(0, tile.keys)
        p = _probabilities(q, k, tile, buffers[0], biases)
        _add_product(dv[:, seen], p.transpose(1, 2), dout[:, rows], 1.0)
        ds = _shaped(buffers[1].scores, p.shape).baddbmm_(dout[:, rows], v[:, seen].transpose(1, 2), beta=0)
        torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
        if biases is not None:
            biases.add_gradient(tile, ds)
        _add_product(dk[:, seen], ds.transpose(1, 2), q[:, rows], scale)
        dq[:, rows].baddbmm_(ds, k[:, seen], beta=0, alpha=scale)


def _scores(q: torch.Tensor, tile: Tile, buffer: Scratch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Room for the scores of a tile, their masked corner, and what hides it: None where nothing does."""
    rows = tile.rows.stop - tile.rows.start
    p = _shaped(buffer.scores, (len(q), rows, tile.keys))
    if tile.corner is None or rows == 1:
        return p, p, None
    return p, p[:, :-1, tile.corner :], buffer.hidden[: rows - 1, : rows - 1]


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, tile: Tile, buffer: Scratch, biases: Biases | None
) -> torch.Tensor:
    p, corner, hidden = _scores(q, tile, buffer)
    if biases is not None:
        biases.read(tile, p)
    beta = 0 if biases is None else 1
    p.baddbmm_(q[:, tile.rows], k[:, : tile.keys].transpose(1, 2), beta=beta, alpha=q.shape[2] ** -0.5)
    if hidden is not None:
        corner.add_(hidden)
    return torch.softmax(p, dim=2, out=p)


def _add_product(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Several tiles add to one key: ``into`` has single precision at least."""
    if into.dtype == a.dtype:
        into.baddbmm_(a, b, alpha=scale)
    else:
        into.add_(torch.bmm(a, b), alpha=scale)


def _shaped(buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    n, rows, keys = shape
    return buffer[: n * rows * keys].view(n, rows, keys)
