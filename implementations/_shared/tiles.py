"""What a launch of the flash kernels really visits: tiles, pairs and bytes in closed form; no torch, no triton here.

``flash`` multiplies whole tiles, so it executes more pairs than a method needs, and reads a tile of keys once for each
tile of queries that meets it. This is the arithmetic of its kernels on integers, tile by tile of one side.
"""

from __future__ import annotations

from typing import NamedTuple

from ctxbench.implementations._shared.flash_table import Config
from ctxbench.implementations._shared.lines import LEVEL, OPEN, Line, Placed, place


class Visit(NamedTuple):
    """Of one head and one range: tiles visited, those of them that need no mask, and pairs multiplied."""

    tiles: int
    unmasked: int
    pairs: int

    def __add__(self, other: Visit) -> Visit:  # type: ignore[override]
        return Visit(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Visit(0, 0, 0)


def visited(
    kernel: str, chosen: Config, queries: int, keys: int, low: Line | None = None, high: Line | None = None,
    offset: int = 0,
) -> Visit:  # fmt: skip
    """What ``forward``, ``dq`` or ``dkv`` visits of one range, for one query head."""
    first, end = place(low, offset, queries, keys), place(high, offset, queries, keys)
    total = NOTHING
    if kernel == "dkv":
        for start in range(0, keys, chosen.columns):
            total += _tile_of_keys(start, chosen, queries, keys, first, end)
    else:
        for start in range(0, queries, chosen.rows):
            total += _tile_of_rows(start, chosen, queries, keys, first, end)
    return total


def bytes_read(visit: Visit, kernel: str, chosen: Config, width: int, itemsize: int) -> int:
    """Bytes that the visited tiles load, without what caches save: keys and values; or queries and their gradients.

    ``dkv`` also loads the log-sum-exp and the row sums, four bytes each.
    """
    loaded = chosen.rows if kernel == "dkv" else chosen.columns
    return visit.tiles * loaded * (2 * width * itemsize + 8 * (kernel == "dkv"))


def _tile_of_rows(start: int, chosen: Config, queries: int, keys: int, low: Placed, high: Placed) -> Visit:
    final = min(start + chosen.rows, queries) - 1
    first, all_first = (_key_at(low, row, keys, 0) for row in (start, final))
    all_end, end = (_key_at(high, row, keys, keys) for row in (start, final))
    return _visit(first, end, all_first, all_end, chosen.columns, chosen.rows)


def _tile_of_keys(start: int, chosen: Config, queries: int, keys: int, low: Placed, high: Placed) -> Visit:
    final = min(start + chosen.columns, keys) - 1
    first, all_first = (_row_past(high, key, queries, 0) for key in (start, final))
    all_end, end = (_row_past(low, key, queries, queries) for key in (start, final))
    return _visit(first, end, all_first, all_end, chosen.rows, chosen.columns)


def _visit(first: int, end: int, all_first: int, all_end: int, block: int, other: int) -> Visit:
    begin, last = first // block, -(-end // block)
    inner = min(max(-(-all_first // block), begin), last)
    outer = min(max(all_end // block, inner), last)
    tiles = max(0, last - begin)
    return Visit(tiles, outer - inner, tiles * block * other)


def _key_at(line: Placed, row: int, keys: int, otherwise: int) -> int:
    return otherwise if line.kind == OPEN else min(max(line.at(row), 0), keys)


def _row_past(line: Placed, key: int, queries: int, otherwise: int) -> int:
    if line.kind == OPEN:
        return otherwise
    ahead = max(key + 1 - line.base, 0)
    if line.kind == LEVEL:
        return queries if ahead else 0
    return min(max(-(-ahead // line.stride) * line.step - line.shift, 0), queries)
