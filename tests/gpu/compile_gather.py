"""Compile the kernels that select and gather for devices that are not here, and print what the machine code shows.

``python compile_gather.py [--list] [ARCHITECTURE:ITEMSIZE:WIDTH[/PART] ...]`` prints a JSON line a kernel; without
targets of all widths. PART is ``tokens`` or ``slots``, by which attention in clusters gives its results, with the
choice of clusters and the search of a memory; or ``gate``: the kernels that know no width, alone. Without it both
results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compile_flash import POINTERS
from machine import DTYPES, TARGETS, Made, compilation, described, main

from ctxbench.implementations._shared import flash_table
from ctxbench.implementations.memorizing import search
from ctxbench.implementations.memory_bank import gate
from ctxbench.implementations.routing import choosing, gathered

NUMBERS = ("QUERIES", "KEYS", "QUERY_BEGINS", "KEY_BEGINS", "IDS", "SLOTS", "BEGINS", "PICKED")
SIZES = ("heads", "T", "N", "M", "clusters", "centroids", "w", "past", "length", "most")
RESULTS = ("tokens", "slots")
# Pairs a query keeps: fewer than the least room for them, the published number, fewer than their room, and the most.
TOP = (7, 32, 48, 128)
WIDTHS = (16, 32, 64, 128)

Kernel = tuple[str, str, Any, dict[str, Any], tuple[int, ...], int, int]  # name, form, ..., constants, warps, stages


def routing(architecture: int, itemsize: int, shape: dict[str, int], results: tuple[str, ...]) -> Iterator[Kernel]:
    """Attention in clusters with every rule; choosing and adding up."""
    for kernel in flash_table.KERNELS:
        chosen = gathered.config(kernel, shape["D"], itemsize, architecture)
        for by in results:
            rules = {"CLUSTERS": 64, "EARLIER": True, "WITHOUT_SELF": True, "BY_SLOT": by == "slots"}
            constants = shape | rules | {"ROWS": chosen.rows, "COLUMNS": chosen.columns}
            function = getattr(gathered, f"{kernel}_kernel")
            yield kernel, f"clusters, by {by}", function, constants, chosen[:2], chosen.warps, chosen.stages
    tile = choosing.TOKENS, choosing.centroids_of_tile(shape["D"], itemsize)
    yield (
        "nearest", "clusters", choosing.nearest_kernel, shape | {"ROWS": tile[0], "COLUMNS": tile[1]}, tile, 4, 3,
    )  # fmt: skip
    yield "taken", "clusters", choosing.taken_kernel, {"SIZE": choosing.SELECT}, (choosing.SELECT,), 4, 3
    tile = choosing.ADDED, shape["WIDTH"]
    yield (
        "add",
        "clusters",
        choosing.add_kernel,
        shape | {"ROWS": choosing.ADDED, "MEAN": True},
        tile,
        choosing.adding(shape["D"]),
        3,
    )


def memorizing(architecture: int, itemsize: int, shape: dict[str, int], *_: Any) -> Iterator[Kernel]:
    """The search for few and for many pairs, and the gradient of what was picked."""
    for top in TOP:
        tile = search.queries(top, shape["D"], itemsize), search.keys(top, shape["D"], itemsize)
        warps = search.warps(shape["D"], itemsize)
        kept = {"ROWS": tile[0], "COLUMNS": tile[1], "TOP": top, "KEPT": flash_table.padded(top), "KEEP": True}
        yield "search", f"memory, best {top}", search.search_kernel, shape | kept, tile, warps, 2
    constants, tile = shape | {"ROWS": search.GATHERING, "TOP": TOP[1]}, (search.GATHERING, shape["WIDTH"])
    yield "picked", "memory", search.gradient_kernel, constants, tile, 4, 3


def memory_bank(architecture: int, itemsize: int, shape: dict[str, int], *_: Any) -> Iterator[Kernel]:
    """The gate and its gradient; the width of a head is nothing to them."""
    tile = gate.TILES[itemsize]
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    yield "gate", "bank", gate.gate_kernel, constants | {"KEEP": True}, tile[:3], tile.warps, tile.stages
    yield "gradient", "bank", gate.gradient_kernel, constants, tile[:3], tile.warps, tile.stages


def asked(item: str) -> Iterator[Made]:
    pointers = POINTERS | dict.fromkeys(NUMBERS, "*i32") | {"SHARE": "*fp32"}
    target, _, part = item.partition("/")
    architecture, itemsize, width = map(int, target.split(":"))
    shape, results = {"D": width, "WIDTH": flash_table.padded(width)}, (part,) if part else RESULTS
    for method in (memory_bank,) if part == "gate" else (routing, memorizing):
        for kernel, form, function, constants, tile, warps, stages in method(architecture, itemsize, shape, results):
            made = compilation(function, constants, DTYPES[itemsize], pointers, SIZES, architecture, warps, stages)
            yield described(kernel, form, architecture, itemsize, width, tile, made)


def everything() -> Iterator[str]:
    for architecture, itemsize in TARGETS:
        yield from (f"{architecture}:{itemsize}:{width}" for width in WIDTHS)
        yield f"{architecture}:{itemsize}:64/gate"


if __name__ == "__main__":
    main(asked, everything())
