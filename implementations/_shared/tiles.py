"""What a launch of the flash kernels really does: tiles, products and bytes in closed form; no torch, no triton here.

Kernels multiply whole tiles, so they execute more pairs than a method needs, and read a tile of keys once for each tile
of queries that meets it. This is their arithmetic on integers, tile by tile of one side, and for lists of blocks a few
multiplications. Bytes are those of elements that a mask lets through, without what caches save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ctxbench.implementations._shared.flash_table import Config, chunk, padded
from ctxbench.implementations._shared.lines import LEVEL, OPEN, PLAIN, SLOPES, TABLE, Placed

NUMBER = 4  # bytes of a bias, of a row's log-sum-exp or sum, and of an entry of a list
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "table": 2}  # of a tile
# Of each row of queries, once: numbers loaded, rows of channels stored, numbers stored.
ONCE = {"forward": (0, 1, 1), "dq": (1, 1, 1), "table": (2, 0, 0)}
# Rows of channels loaded: a tile's own once, its own again for each tile of the other side that it meets, and those of
# that tile; and the same where products take channels in chunks, before all of them are needed side by side.
LOADED = {"forward": (1, 0, 2), "dq": (3, 0, 2), "dkv": (2, 0, 2), "table": (2, 0, 2)}
CHUNKED = {"forward": (0, 1, 2), "dq": (2, 2, 3), "dkv": (0, 2, 4), "table": (0, 2, 2)}


class Work(NamedTuple):
    """Tiles visited, those of them that need no mask and have one bias, products of two tiles, and bytes."""

    tiles: int = 0
    unmasked: int = 0
    products: int = 0
    loaded: int = 0
    stored: int = 0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: int) -> Work:  # type: ignore[override]
        return Work(*(times * a for a in self))

    @property
    def moved(self) -> int:
        """Bytes loaded and stored."""
        return self.loaded + self.stored

    def flops(self, chosen: Config, width: int) -> int:
        """What these products execute, channels that only fill a tile included."""
        return 2 * self.products * chosen.rows * chosen.columns * padded(width)


class Keys(NamedTuple):
    """One range of ``keys`` keys as a launch describes it; see ``ranges.Shown``."""

    keys: int
    low: Placed = Placed()
    high: Placed = Placed()
    bias: int = PLAIN
    ahead: int = 0
    known: bool = True


class _Met(NamedTuple):
    """The tiles of the other side that one tile meets, in the order of ``flash._tiles``."""

    first: int
    inner: int
    near: int
    past: int
    outer: int
    last: int

    @property
    def tiles(self) -> int:
        return max(0, self.last - self.first)

    @property
    def unmasked(self) -> int:
        return self.near - self.inner + self.outer - self.past if self.tiles else 0

    def edges(self) -> Iterator[int]:
        yield from range(self.first, self.inner)
        yield from range(self.near, self.past)
        yield from range(self.outer, self.last)


def attended(
    kernel: str, chosen: Config, queries: int, ranges: Sequence[Keys], width: int, itemsize: int, *, heads: int = 1,
    group: int = 1, farthest: int = 0, through_lse: bool = False,
) -> Work:  # fmt: skip
    """One launch of ``forward``, ``dq``, ``dkv`` (of one range) or ``table`` for ``heads`` query heads of all batches.

    ``group`` of them share a head of keys; ``farthest`` is the reach of a table of biases; ``through_lse``: dQ gets a
    gradient of the log-sum-exp too.
    """
    row, once = width * itemsize, _rows_loaded(kernel, width, itemsize)[0]
    if kernel == "dkv":
        (one,) = ranges
        own = Work(loaded=once * one.keys * row, stored=2 * one.keys * row)
        return _of_keys(chosen, queries, one, width, itemsize, farthest) * heads + own * (heads // group)
    numbers, rows_stored, numbers_stored = ONCE[kernel]
    work = Work(
        loaded=queries * (once * row + (numbers + through_lse) * NUMBER),
        stored=queries * (rows_stored * row + numbers_stored * NUMBER),
    )
    if kernel == "table":  # what is too far on either side, by tile of queries
        work += Work(stored=2 * NUMBER * -(-queries // chosen.rows))
        ranges = [one for one in ranges if one.bias == TABLE]
    for one in ranges:
        work += _of_rows(kernel, chosen, queries, one, width, itemsize, farthest)
    return work * heads


def turned(rows: int, width: int, itemsize: int, heads: int, together: int = 1) -> Work:
    """Rows of so many heads turned by their angles, which are read once for some heads ``together``.

    Attention that turns its queries does this beside what it ``attended``.
    """
    row = rows * width * itemsize * heads
    return Work(loaded=row + rows * width * NUMBER * -(-heads // together), stored=row)


def listed(
    kernel: str, chosen: Config, queries: int, keys: int, size: int, entries: int, last: int, width: int,
    itemsize: int, *, heads: int = 1, batch: int = 1, bias: int = PLAIN, farthest: int = 0,
    apart: Mapping[int, int] | None = None, lasting: int = 0,
) -> Work:  # fmt: skip
    """One launch over lists of blocks of ``size`` tokens with ``entries`` in the lists of all heads.

    ``last`` of the entries are the last block of keys, for ``dkv`` in the list of the last block of queries: it may be
    shorter. ``lasting``: those of the other side's last block, where products take channels in chunks. ``apart``, for
    ``table``: how many entries begin each number of tokens after the block of queries that lists them.
    """
    row, heads = width * itemsize, batch * heads
    own, other = (keys, queries) if kernel == "dkv" else (queries, keys)
    mine, theirs = (chosen.columns, chosen.rows) if kernel == "dkv" else (chosen.rows, chosen.columns)
    pieces = -(-size // mine)
    steps = entries * pieces * -(-size // theirs) * batch
    blocks = -(-other // size)
    seen = batch * pieces * (size * entries - (blocks * size - other) * last)
    programs = -(-own // size) * pieces * heads
    biases = {SLOPES: 1, TABLE: chosen.rows * chosen.columns}.get(bias, 0)
    loaded, stored = programs * 2 * NUMBER + steps * (NUMBER + NUMBER * biases), 0
    if kernel == "table":
        diagonals = sum(
            count * _diagonals(place + at - row, chosen, farthest)
            for place, count in (apart or {}).items()
            for row in range(0, size, chosen.rows)
            for at in range(0, size, chosen.columns)
        )
        loaded += NUMBER * batch * diagonals
        stored = NUMBER * (batch * diagonals + 2 * programs)
    once_rows, again, others = _rows_loaded(kernel, width, itemsize)
    own_seen = batch * -(-size // theirs) * (size * entries - (-(-own // size) * size - own) * lasting)
    loaded += seen * (others * row + 2 * NUMBER * (kernel == "dkv")) + own_seen * again * row
    if kernel == "dkv":
        once = Work(loaded=once_rows * own * row, stored=2 * own * row)
    else:
        numbers, rows_stored, numbers_stored = ONCE[kernel]
        once = Work(
            loaded=own * (once_rows * row + numbers * NUMBER),
            stored=own * (rows_stored * row + numbers_stored * NUMBER),
        )
    return once * heads + Work(steps, 0, steps * PRODUCTS[kernel], loaded, stored)


def decoded(
    rows: int, columns: int, queries: int, keys: int, part: int, width: int, itemsize: int, *, heads: int = 1,
    group: int = 1,
) -> tuple[Work, Work]:  # fmt: skip
    """The launches of ``decode`` for ``heads`` heads of keys of all batches: parts of ``part`` keys, and their merging.

    ``group`` query heads share a head of keys; their queries are rows of one tile. One part needs no merging.
    """
    row, parts, packed = width * itemsize, -(-keys // part), heads * group * queries
    steps = heads * -(-group * queries // rows) * -(-keys // columns)
    read = heads * -(-group * queries // rows) * keys
    kept = row if parts == 1 else width * NUMBER  # partial results are in float32
    again = -(-keys // columns) if chunk(width, itemsize) < padded(width) else parts  # times that queries are loaded
    partial = Work(
        steps, 0, 2 * steps, loaded=2 * read * row + again * packed * row, stored=parts * packed * (kept + NUMBER)
    )
    if parts == 1:
        return partial, Work()
    return partial, Work(loaded=packed * parts * (width + 1) * NUMBER, stored=packed * (row + NUMBER))


def _rows_loaded(kernel: str, width: int, itemsize: int) -> tuple[int, int, int]:
    return (CHUNKED if chunk(width, itemsize) < padded(width) else LOADED)[kernel]


def _of_rows(
    kernel: str, chosen: Config, queries: int, one: Keys, width: int, itemsize: int, farthest: int
) -> Work:  # fmt: skip
    """What tiles of queries, of one head, do with one range."""
    work, block, row = Work(), chosen.columns, width * itemsize
    _once, again, others = _rows_loaded(kernel, width, itemsize)
    for start in range(0, queries, chosen.rows):
        final = min(start + chosen.rows, queries) - 1
        first, all_first = (_key_at(one.low, at, one.keys, 0) for at in (start, final))
        all_end, end = (_key_at(one.high, at, one.keys, one.keys) for at in (start, final))
        near = one.keys, one.keys
        if one.bias == TABLE:
            near = max(start - one.ahead - farthest + 1, 0), max(final - one.ahead + farthest, 0)
        met = _met(first, end, all_first, all_end, *near, block)
        seen = min(met.last * block, one.keys) - met.first * block if met.tiles else 0
        loaded = seen * (others * row + NUMBER * (not one.known)) + _biases(met, one.bias, chosen)
        loaded += met.tiles * (final + 1 - start) * again * row
        stored = 0
        if kernel == "table":
            places = (tile * block + one.ahead - start for tile in met.edges())
            stored = NUMBER * sum(_diagonals(place, chosen, farthest) for place in places)
        work += Work(met.tiles, met.unmasked, met.tiles * PRODUCTS[kernel], loaded + stored, stored)
    return work


def seen_by_rows(start: int, side: int, queries: int, one: Keys) -> tuple[int, int, int, int]:
    """Of tiles of ``side`` keys: the first that any of ``side`` queries from ``start`` on sees, those all see, the end.

    Unlike a kernel's loop it is empty where a range is.
    """
    final = min(start + side, queries) - 1
    first, all_first = (_key_at(one.low, at, one.keys, 0) for at in (start, final))
    all_end, end = (_key_at(one.high, at, one.keys, one.keys) for at in (start, final))
    met = _met(first, end, all_first, all_end, one.keys, one.keys, side)
    return (met.first, met.inner, met.outer, met.last) if first < end else (0, 0, 0, 0)


def _of_keys(chosen: Config, queries: int, one: Keys, width: int, itemsize: int, farthest: int) -> Work:
    """What tiles of keys do with the queries of one head."""
    work, block, row = Work(), chosen.rows, width * itemsize
    _once, again, others = _rows_loaded("dkv", width, itemsize)
    for start in range(0, one.keys, chosen.columns):
        final = min(start + chosen.columns, one.keys) - 1
        first, all_first = (_row_past(one.high, at, queries, 0) for at in (start, final))
        all_end, end = (_row_past(one.low, at, queries, queries) for at in (start, final))
        near = queries, queries
        if one.bias == TABLE:
            near = max(start + one.ahead - farthest + 1, 0), max(final + one.ahead + farthest, 0)
        met = _met(first, end, all_first, all_end, *near, block)
        seen = min(met.last * block, queries) - met.first * block if met.tiles else 0
        own = met.tiles * (final + 1 - start) * (again * row + NUMBER * (not one.known))
        loaded = seen * (others * row + 2 * NUMBER) + own + _biases(met, one.bias, chosen)
        work += Work(met.tiles, met.unmasked, met.tiles * PRODUCTS["dkv"], loaded)
    return work


def _met(first: int, end: int, all_first: int, all_end: int, near_first: int, near_end: int, block: int) -> _Met:
    begin, last = first // block, -(-end // block)
    inner = min(max(-(-all_first // block), begin), last)
    outer = min(max(all_end // block, inner), last)
    near = min(max(near_first // block, inner), outer)
    past = min(max(-(-near_end // block), near), outer)
    return _Met(begin, inner, near, past, outer, last)


def _biases(met: _Met, bias: int, chosen: Config) -> int:
    """Bytes of biases: of slopes one number a tile, of a table one too, or at edges and near one a pair."""
    if bias == TABLE:
        return NUMBER * (met.unmasked + (met.tiles - met.unmasked) * chosen.rows * chosen.columns)
    return NUMBER * met.tiles * (bias == SLOPES)


def _diagonals(distance: int, chosen: Config, farthest: int) -> int:
    """How many of a tile's diagonals, ``distance`` that of its first pair, are nearer than ``farthest``."""
    return max(0, min(distance + chosen.columns, farthest - 1) - max(distance - chosen.rows + 1, 1 - farthest) + 1)


def _key_at(line: Placed, row: int, keys: int, otherwise: int) -> int:
    return otherwise if line.kind == OPEN else min(max(line.at(row), 0), keys)


def _row_past(line: Placed, key: int, queries: int, otherwise: int) -> int:
    if line.kind == OPEN:
        return otherwise
    ahead = max(key + 1 - line.base, 0)
    if line.kind == LEVEL:
        return queries if ahead else 0
    return min(max(-(-ahead // line.stride) * line.step - line.shift, 0), queries)
