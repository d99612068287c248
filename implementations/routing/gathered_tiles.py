"""What a launch of the kernels in ``gathered`` and ``choosing`` really does; no torch, no triton here.

As ``tiles`` of the shared kernels: elements that a mask lets through, as often as a tile asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ctxbench.implementations._shared.flash_table import Config
from ctxbench.implementations._shared.tiles import NUMBER, PRODUCTS, Work


def gathered(
    kernel: str, chosen: Config, runs: Sequence[tuple[int, int]], width: int, itemsize: int, *, earlier: bool,
    without_self: bool = False, by_slot: bool = False,
) -> Work:  # fmt: skip
    """One launch of ``forward``, ``dq`` or ``dkv`` for one head whose clusters list so many (queries, keys)."""
    work = Work()
    for queries, keys in runs:
        if kernel == "dkv":
            work += _by_keys(chosen, queries, keys, width, itemsize, earlier, by_slot)
        else:
            work += _by_rows(kernel, chosen, queries, keys, width, itemsize, earlier, without_self, by_slot)
    # Every program looks for its run among the begins of all; the grid is a bound on tiles.
    listed = sum(keys for _, keys in runs) if kernel == "dkv" else sum(queries for queries, _ in runs)
    programs = listed // (chosen.columns if kernel == "dkv" else chosen.rows) + len(runs)
    return work + Work(loaded=programs * (2 * len(runs) + 4) * NUMBER)


def _by_rows(
    kernel: str, chosen: Config, queries: int, keys: int, width: int, itemsize: int, earlier: bool, without_self: bool,
    by_slot: bool,
) -> Work:  # fmt: skip
    """Tiles of a run's queries along the keys before them, or along all; ranks are aligned at the run's end."""
    row, back, work = width * itemsize, kernel == "dq", Work()
    for start in range(0, queries, chosen.rows):
        whole, last = keys // chosen.columns, -(-keys // chosen.columns)
        if earlier:
            position = start + keys - queries
            whole = (position + 1 - without_self) // chosen.columns
            last = -(-min(position + chosen.rows, keys) // chosen.columns)
        own, read = min(chosen.rows, queries - start), min(last * chosen.columns, keys)
        once = 3 * row + 2 * NUMBER + NUMBER * by_slot if back else row + NUMBER
        result = width * NUMBER if back and by_slot else row  # gradients by slot are in float32
        loaded, stored = own * once + read * (2 * row + NUMBER), own * (result + NUMBER)
        work += Work(last, whole, last * PRODUCTS[kernel], loaded, stored)
    return work


def _by_keys(
    chosen: Config, queries: int, keys: int, width: int, itemsize: int, earlier: bool, by_slot: bool
) -> Work:  # fmt: skip
    """Tiles of a run's keys along the queries that may see them."""
    row, work = width * itemsize, Work()
    for start in range(0, keys, chosen.columns):
        first = max(start - (keys - queries), 0) // chosen.rows if earlier else 0
        steps = max(0, -(-queries // chosen.rows) - first)
        own, read = min(chosen.columns, keys - start), max(0, queries - first * chosen.rows)
        loaded = own * (2 * row + NUMBER) + read * (2 * row + 3 * NUMBER + NUMBER * by_slot)
        result = width * NUMBER if by_slot else row
        work += Work(steps, 0, steps * PRODUCTS["dkv"], loaded, 2 * own * result)
    return work


def nearest(rows: int, columns: int, tokens: int, centroids: int, width: int, itemsize: int) -> Work:
    """One launch of ``nearest_kernel`` for one head: every tile of tokens reads all centroids."""
    started, steps = -(-tokens // rows), -(-centroids // columns)
    loaded = (tokens + started * centroids) * width * itemsize
    return Work(started * steps, started * (centroids // columns), started * steps, loaded, tokens * NUMBER)


def taken(tokens: int, w: int, itemsize: int) -> Work:
    """One launch of ``taken_kernel`` for one centroid: a histogram for each of four bytes, and who is in."""
    return Work(loaded=5 * tokens * itemsize, stored=w * NUMBER)


def added(tokens: int, slots: int, width: int, itemsize: int, of_result: int) -> Work:
    """One launch of ``add_kernel`` for one head, from elements of ``itemsize`` bytes to those of ``of_result``."""
    return Work(loaded=2 * tokens * NUMBER + slots * (NUMBER + width * itemsize), stored=tokens * width * of_result)
