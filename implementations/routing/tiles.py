"""Attention of runs of queries against runs of keys, a tile of queries at a time; no more than its scores are alive.

A tile meets every key that one of its queries sees, so its softmax is complete and the backward pass can compute it
again from queries and keys alone. n runs at once, R queries and M keys each, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

TILE = 64  # queries a tile: larger ones multiply more masked pairs, smaller ones cost more calls
ALIVE = 1 << 18  # scores that are alive together where runs are equally long: a megabyte in single precision


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # results, queries, keys, values


def others(exclude_self: bool, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Operands:
    """What meets where run and queries are the same tokens; without a token itself the first query is left out."""
    return (out[:, 1:], q[:, 1:], k[:, :-1], v[:, :-1]) if exclude_self else (out, q, k, v)


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
    """Room for the scores of any tile, flat, and the mask of a corner; used again and again."""

    scores: torch.Tensor
    hidden: torch.Tensor


def scratch(like: torch.Tensor, runs: int, R: int, M: int) -> Scratch:
    """For so many runs of at most R queries and M keys."""
    rows = min(R, TILE)
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=like.device).triu()
    return Scratch(like.new_empty(runs * rows * M), hidden)


def attend(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int | None, buffer: Scratch
) -> None:
    """Write the result of ``q: [n, R, D]``, ``k, v: [n, M, D]`` into ``out: [n, R, D]``."""
    for tile in tiles(q.shape[1], k.shape[1], first):
        p = _probabilities(q, k, tile, buffer)
        out[:, tile.rows] = p @ v[:, : tile.keys]  # in place, the product would go through n one after the other


def attend_backward(
    gradients: Sequence[torch.Tensor], dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, first: int | None, buffers: tuple[Scratch, Scratch],
) -> None:  # fmt: skip
    """Write ``dq`` and add to ``dk`` and ``dv``; five products where the forward pass has two."""
    dq, dk, dv = gradients
    scale = q.shape[2] ** -0.5
    for tile in tiles(q.shape[1], k.shape[1], first):
        rows, seen = tile.rows, slice(0, tile.keys)
        p = _probabilities(q, k, tile, buffers[0])
        _add_product(dv[:, seen], p.transpose(1, 2), dout[:, rows], 1.0)
        ds = _shaped(buffers[1].scores, p.shape).baddbmm_(dout[:, rows], v[:, seen].transpose(1, 2), beta=0)
        torch._softmax_backward_data(ds, p, 2, p.dtype, grad_input=ds)
        _add_product(dk[:, seen], ds.transpose(1, 2), q[:, rows], scale)
        dq[:, rows].baddbmm_(ds, k[:, seen], beta=0, alpha=scale)


def _probabilities(q: torch.Tensor, k: torch.Tensor, tile: Tile, buffer: Scratch) -> torch.Tensor:
    query = q[:, tile.rows]
    n, rows, D = query.shape
    p = _shaped(buffer.scores, (n, rows, tile.keys))
    p.baddbmm_(query, k[:, : tile.keys].transpose(1, 2), beta=0, alpha=D**-0.5)
    if tile.corner is not None and rows > 1:
        p[:, :-1, tile.corner :].masked_fill_(buffer.hidden[: rows - 1, : rows - 1], float("-inf"))
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
