"""What a launch of the kernels in ``search`` really does, from the shapes alone; no torch, no triton here.

As ``tiles`` of the shared kernels: elements that a mask lets through, as often as a tile asks for them. Values and keys
are gathered for weights that are not 0, so a weight too small for its dtype would be charged and not read.
"""

from __future__ import annotations

from ctxbench.implementations._shared.tiles import NUMBER, Work


def searched(
    rows: int, columns: int, queries: int, keys: int, top_k: int, past: int, length: int, most: int, width: int,
    itemsize: int, *, keep: bool,
) -> Work:  # fmt: skip
    """One launch of ``search_kernel`` for one head: tiles of ``rows`` queries along tiles of ``columns`` keys.

    Rows of a tile beyond its queries pick keys too, as if by a query of zeros, and read their values.
    """
    row, work = width * itemsize, Work()
    for begin in range(0, queries, length):
        seen = min(past + begin, keys, most)
        own, tiles = min(length, queries - begin), -(-seen // columns)
        started = -(-own // rows)
        once = 2 * row + keep * top_k * (NUMBER + itemsize)  # a query and its result, and what it picked
        loaded = (own + started * (seen + rows * min(top_k, seen))) * row
        work += Work(started * tiles, started * (seen // columns), started * tiles, loaded, own * (once - row))
    return work


def gradient(queries: int, top_k: int, picked: int, width: int, itemsize: int) -> Work:
    """One launch of ``gradient_kernel`` for one head, whose queries picked so many keys in sum."""
    row = width * itemsize
    listed = queries * top_k * (NUMBER + itemsize)
    return Work(loaded=2 * queries * row + listed + 2 * picked * row, stored=queries * row)
