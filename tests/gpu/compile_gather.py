"""Compile the kernels that select and gather for devices that are not here, and print what the machine code shows.

``python compile_gather.py ARCHITECTURE:ITEMSIZE:WIDTH[/RESULTS] ...`` prints a JSON line a kernel; see
``compile_flash``. RESULTS is ``tokens`` or ``slots``, by which attention in clusters gives them, or ``gate``: the
kernels that know no width, alone. Without it everything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from compile_flash import POINTERS, compile_function, report

from ctxbench.implementations._shared import flash_table
from ctxbench.implementations.memorizing import search
from ctxbench.implementations.memory_bank import gate
from ctxbench.implementations.routing import choosing, gathered

NUMBERS = ("QUERIES", "KEYS", "QUERY_BEGINS", "KEY_BEGINS", "IDS", "SLOTS", "BEGINS", "PICKED")
SIZES = ("heads", "T", "N", "M", "clusters", "centroids", "w", "past", "length", "most")
RESULTS = ("tokens", "slots")
TOP = (32, 128)  # pairs a query keeps: the published number, and the most

Kernel = tuple[str, Any, dict[str, Any], int, int]  # name, kernel, compile-time constants, warps, stages


def routing(architecture: int, itemsize: int, shape: dict[str, int], results: tuple[str, ...]) -> Iterator[Kernel]:
    """Attention in clusters with every rule; choosing and adding up."""
    for kernel in flash_table.KERNELS:
        chosen = gathered.config(kernel, shape["D"], itemsize, architecture)
        for by in results:
            rules = {"CLUSTERS": 64, "EARLIER": True, "WITHOUT_SELF": True, "BY_SLOT": by == "slots"}
            tiles = {"ROWS": chosen.rows, "COLUMNS": chosen.columns}
            yield (
                f"{kernel} by {by}",
                getattr(gathered, f"{kernel}_kernel"),
                shape | rules | tiles,
                chosen.warps,
                chosen.stages,
            )
    tiles = {"ROWS": choosing.TOKENS, "COLUMNS": choosing.centroids_of_tile(shape["D"], itemsize)}
    yield "nearest", choosing.nearest_kernel, shape | tiles, 4, 3
    if results == RESULTS:
        yield "taken", choosing.taken_kernel, {"SIZE": choosing.SELECT}, 4, 3
    yield "add", choosing.add_kernel, shape | {"ROWS": choosing.ADDED, "MEAN": True}, 4, 3


def memorizing(architecture: int, itemsize: int, shape: dict[str, int], *_: Any) -> Iterator[Kernel]:
    """The search for few and for many pairs, and the gradient of what was picked."""
    for top in TOP:
        kept = {
            "ROWS": search.queries(top, shape["D"], itemsize),
            "COLUMNS": search.KEYS[itemsize],
            "TOP": top,
            "KEPT": top,
            "KEEP": True,
        }
        yield f"search {top}", search.search_kernel, shape | kept, search.warps(shape["D"], itemsize), 2
    yield "picked", search.gradient_kernel, shape | {"ROWS": search.GATHERING, "TOP": TOP[0]}, 4, 3


def memory_bank(architecture: int, itemsize: int, shape: dict[str, int], *_: Any) -> Iterator[Kernel]:
    """The gate and its gradient; the width of a head is nothing to them."""
    tile = gate.TILES[itemsize]
    tiles = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    yield "gate", gate.gate_kernel, tiles | {"KEEP": True}, tile.warps, tile.stages
    yield "gate's gradient", gate.gradient_kernel, tiles, tile.warps, tile.stages


def asked(wanted: list[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    pointers = POINTERS | dict.fromkeys(NUMBERS, "*i32") | {"SHARE": "*fp32"}
    for item in wanted:
        target, _, results = item.partition("/")
        architecture, itemsize, width = map(int, target.split(":"))
        dtype, shape = {2: "bf16", 4: "fp32"}[itemsize], {"D": width, "WIDTH": flash_table.padded(width)}
        for method in (routing, memorizing, memory_bank):
            if results and (results == "gate") != (method is memory_bank):
                continue
            for name, kernel, constants, warps, stages in method(
                architecture, itemsize, shape, (results,) if results else RESULTS
            ):
                compiled = compile_function(kernel, constants, dtype, pointers, SIZES, architecture, warps, stages)
                row = {"kernel": name, "architecture": architecture, "itemsize": itemsize, "width": width}
                row["multiplies"] = name not in ("taken", "add", "picked")
                yield row, compiled


if __name__ == "__main__":
    report(asked(sys.argv[1:]))
