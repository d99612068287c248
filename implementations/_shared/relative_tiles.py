"""What a launch of the relative term's kernels really does, as ``tiles`` says of the others; no torch, no triton here.

A walk along keys meets a block of distances more than it has tiles, for its first tile has two; walks by keys and by
distances load both blocks of every tile again. Rows beyond an edge of a tensor are not loaded, so that a block counts
by its overlap with it, and a whole walk by the overlap of one stretch.
"""

from __future__ import annotations

from typing import NamedTuple

from ctxbench.implementations._shared.relative_table import Stair, chunk, padded
from ctxbench.implementations._shared.tiles import NUMBER, Work

FIRST = {"forward": 1, "dq": 2}  # products of a walk beside those of its tiles: with the first block, and with the last
PRODUCTS = {"forward": 3, "dq": 5, "dkv": 6, "dr": 6}  # of a tile


class Launch(NamedTuple):
    """One launch for one head: rows of queries, keys, entries of the second stream, distances that have a key.

    ``entries`` is 0 where there is no second stream; ``side`` is that of a tile.
    """

    rows: int
    keys: int
    entries: int
    distances: int
    width: int
    itemsize: int
    side: int
    stair: Stair

    @property
    def chunked(self) -> bool:
        """Whether products take channels in chunks, so that each one loads its rows."""
        return chunk(self.width, self.itemsize) < padded(self.width)


class _Walk(NamedTuple):
    """Tiles from ``first`` to before ``last``; ``at`` is where the first one begins in the other tensor."""

    first: int
    last: int
    at: int

    def tiles(self, side: int) -> int:
        return max(0, -(-(self.last - self.first) // side))


def launched(
    kernel: str, one: Launch, *, heads: int = 1, of_entries: bool = False, split: bool = False, parts: int = 1
) -> Work:
    """One launch of ``forward``, ``dq``, ``dkv`` or ``dr`` for ``heads`` heads of all batches.

    ``of_entries``: dK and dV are those of the second stream; ``split``: those from a key's own segment are written
    apart; ``parts``: over how many programs the segments of a tile of distances are spread.
    """
    if kernel == "dkv":
        work = _of_entries(one) if of_entries else _of_keys(one, split)
    else:
        work = _of_distances(one, parts) if kernel == "dr" else _of_rows(kernel, one)
    return work * heads


def _of_rows(kernel: str, one: Launch) -> Work:
    """Tiles of queries along the keys they see, and along the entries of each segment in a tile."""
    row, side, stair = one.width * one.itemsize, one.side, one.stair
    back = kernel == "dq"
    work = Work()
    for start in range(0, one.rows, side):
        final = min(start + side, one.rows) - 1
        first = max(_low(start, stair), 0)
        near = _Walk(first, final + stair.past + 1 if stair.causal else one.keys, start + stair.past - first)
        walks = [(near._replace(at=near.at - stair.nearest), one.keys)]
        if one.entries:
            for number in range(*_segments(start, final, stair)):
                oldest, newest, shift = _entries(number, stair)
                walks.append((_Walk(oldest, newest, start + shift - oldest), one.entries))
        own = final + 1 - start
        loaded, queries = 2 * row, own * row  # u and w, and the rows that are added to them
        if one.chunked:  # again for each product with distances, and with contents
            loaded, queries = 0, (own + 1) * row * sum(1 + 2 * walk.tiles(side) for walk, _ in walks)
        for walk, count in walks:
            tiles = walk.tiles(side)
            far = walk.at - tiles * side  # the last block of distances
            rows = (2 + (back and one.chunked)) * _overlap(walk.first, walk.first + tiles * side, count)
            rows += own * tiles * (back and one.chunked)  # grad
            rows += _overlap(far, walk.at + side, one.distances)
            if back:  # once more for dQ: block by block as they are complete, and the last
                rows += _overlap(far, walk.at + side, one.distances) if tiles else _block(walk.at - side, one)
            loaded += rows * row
            work += Work(tiles, 0, FIRST[kernel] + tiles * PRODUCTS[kernel])
        loaded += queries + own * (2 * row + NUMBER) * back
        work += Work(loaded=loaded, stored=own * (row + NUMBER))
    return work


def _of_keys(one: Launch, split: bool) -> Work:
    """Tiles of keys along the rows that see them; first, where split, along those of the keys' own segments."""
    stair, side = one.stair, one.side
    work = Work()
    for start in range(0, one.keys, side):
        oldest = start + stair.phase - stair.past  # tokens, counted from the begin of the first segment
        newest = min(start + side, one.keys) - 1 + stair.phase - stair.past
        begin = max(oldest - stair.phase, 0) if stair.causal else 0
        end = newest - stair.phase + stair.memory if stair.band else _end_of(newest + stair.memory, stair)
        end = min(end, one.rows)
        walks = []
        if split:
            walks.append((begin, min(_end_of(newest, stair), end)))
            begin = max(_end_of(oldest, stair), begin)
        walks.append((begin, end))
        at = stair.past - stair.nearest - start  # of row 0
        own = min(side, one.keys - start)
        work += _along_rows(one, own, [_Walk(first, last, first + at) for first, last in walks])
        work += _gradients_of_keys(one, own, split)
    return work


def _of_entries(one: Launch) -> Work:
    """Tiles of entries along the rows of the segments that see any of theirs."""
    stair, side = one.stair, one.side
    gone = stair.past - stair.phase - stair.memory  # rows that have left the memory by segment 0, if positive
    segments = (one.rows - 1 + stair.phase) // stair.segment + 1
    work = Work()
    for start in range(0, one.entries, side):
        low = max((start + 1 - stair.known) * stair.rate - gone, 0)
        high = (start + side + stair.capacity - stair.known) * stair.rate - 1 - gone
        begin = 0 if start < stair.known else -(-low // stair.segment)
        end = 0 if high < 0 else high // stair.segment + 1
        walks = []
        for number in range(begin, min(end, segments)):
            since, until = _rows_of(number, one)
            walks.append(_Walk(since, until, since + _entries(number, stair)[2] - start))
        own = min(side, one.entries - start)
        work += _along_rows(one, own, walks) + _gradients_of_keys(one, own, False)
    return work


def _along_rows(one: Launch, keys: int, walks: list[_Walk]) -> Work:
    """Walks of one tile of so many keys: two blocks of distances a tile, and of a row its channels and two numbers."""
    row, side = one.width * one.itemsize, one.side
    work = Work()
    for walk in walks:
        tiles = walk.tiles(side)
        rows = _overlap(walk.first, walk.first + tiles * side, one.rows)
        far = _pairs_of_blocks(walk.at, tiles, one.distances, side)
        again = 2 * keys * tiles * one.chunked
        loaded = rows * (_thrice(one) * row + 2 * NUMBER) + (far + again) * row
        work += Work(tiles, 0, tiles * PRODUCTS["dkv"], loaded)
    return work


def _gradients_of_keys(one: Launch, keys: int, split: bool) -> Work:
    """What a tile of so many keys loads and stores once: keys, values and their gradients, and a part of du."""
    row = one.width * one.itemsize
    return Work(loaded=(2 - one.chunked) * keys * row, stored=2 * (1 + split) * keys * row + one.width * NUMBER)


def _of_distances(one: Launch, parts: int) -> Work:
    """Tiles of distances along the rows of every segment that have keys, or entries, so far away."""
    row, side, stair = one.width * one.itemsize, one.side, one.stair
    work = Work()
    for start in range(0, one.distances, side):
        own, distance = min(side, one.distances - start), start + stair.nearest
        for number in range(1 if stair.band else (one.rows - 1 + stair.phase) // stair.segment + 1):
            begin, end, oldest = 0, one.rows if distance < stair.memory else 0, 0
            if not stair.band:
                begin, end = _rows_of(number, one)
                oldest = max(number * stair.segment - stair.phase + stair.past - stair.memory, 0)
            walks = [(oldest, one.keys, stair.past, one.keys)]
            if one.entries:
                seen, newest, shift = _entries(number, stair)
                walks.append((seen, newest, shift, one.entries))
            for oldest, newest, shift, count in walks:
                first = max(begin, distance + oldest - shift)
                walk = _Walk(first, min(end, distance + side - 1 - shift + newest), first + shift - distance)
                tiles = walk.tiles(side)
                rows = _overlap(first, first + tiles * side, one.rows)
                keys = _pairs_of_blocks(walk.at, tiles, count, side)
                again = own * tiles * one.chunked
                loaded = rows * (_thrice(one) * row + 2 * NUMBER) + (2 * keys + again) * row
                work += Work(tiles, 0, tiles * PRODUCTS["dr"], loaded)
        # In float32, a part of the sum from every program.
        work += Work(loaded=own * row, stored=(own + 1) * one.width * NUMBER) * parts
    return work


def _thrice(one: Launch) -> int:
    """Rows of channels loaded for a row of a walk: for contents, distances and gradients, each in two products."""
    return 6 if one.chunked else 3


def _pairs_of_blocks(at: int, tiles: int, count: int, side: int) -> int:
    """Rows below ``count`` of the block at ``at`` and the one before it, both moving on by one block a tile."""
    if not tiles:
        return 0
    end = at + tiles * side
    return _overlap(at, end, count) + _overlap(at - side, end - side, count)


def _block(at: int, one: Launch) -> int:
    return _overlap(at, at + one.side, one.distances)


def _overlap(begin: int, end: int, count: int) -> int:
    return max(0, min(end, count) - max(begin, 0))


def _low(row: int, stair: Stair) -> int:
    if stair.band:
        return row + stair.past - stair.memory + 1
    return (row + stair.phase) // stair.segment * stair.segment - stair.phase + stair.past - stair.memory


def _end_of(token: int, stair: Stair) -> int:
    """One past the last row of the segment of a token that is counted from the begin of the first one."""
    return (0 if token < 0 else token // stair.segment + 1) * stair.segment - stair.phase


def _rows_of(number: int, one: Launch) -> tuple[int, int]:
    """First row of a segment and one past its last."""
    begin = number * one.stair.segment - one.stair.phase
    return max(begin, 0), min(begin + one.stair.segment, one.rows)


def _segments(first: int, last: int, stair: Stair) -> tuple[int, int]:
    return (first + stair.phase) // stair.segment, (last + stair.phase) // stair.segment + 1


def _entries(number: int, stair: Stair) -> tuple[int, int, int]:
    """The first entry that a segment sees, the one after its last, and the shift of its distances."""
    left = max(number * stair.segment - stair.phase + stair.past - stair.memory, 0)
    last = stair.known + left // stair.rate
    return max(last - stair.capacity, 0), last, stair.past - left + last
