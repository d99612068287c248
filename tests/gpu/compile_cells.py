"""Compile the pooling kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_cells.py [--list] [ARCHITECTURE:ITEMSIZE:WIDTH/POOL-LEVELS ...]``. Of keys and values, divided, which
holds every path but the number of tokens of a ragged cell: that is compiled where WIDTH is negative, one tensor of as
many channels. Their launch parameters are a formula; without targets the shapes where it has its extremes.
"""

from __future__ import annotations

from collections.abc import Iterator

from machine import DTYPES, Made, compilation, described, main

from ctxbench.implementations._shared import cells, cells_table

SIZES = ("heads", "T", "shift")
STAGES = 3  # what Triton takes where nobody asks; there is no loop to pipeline
# Both defaults, the widest cells, a pool factor that is no power of two.
SHAPES = (
    "90:2:64/4-2",
    "90:2:128/2-9",
    "90:2:-512/3-5",
    "90:4:-256/2-1",
    "90:4:64/22-2",
    "80:2:64/4-2",
    "80:4:64/22-2",
)


def asked(item: str) -> Iterator[Made]:
    """Pointers and strides are marked as multiples of 16, as they are at run time."""
    target, _, form = item.partition("/")
    architecture, itemsize, width = map(int, target.split(":"))
    pool, levels = map(int, form.split("-"))
    ragged, width, dtype = width < 0, abs(width), DTYPES[itemsize]
    chosen, sources = cells_table.config(pool, levels, width), 1 if ragged else 2
    constants = {
        "SOURCES": sources, "LEVELS": levels, "POOL": pool, "PADDED": cells_table.digit(pool), "D": width,
        "ROWS": chosen.rows, "WIDTH": chosen.width, "MEAN": True, "RAGGED": ragged,
    }  # fmt: skip
    tensors = ((f"*{dtype}", *["i32"] * 3),) * sources, [(which, at) for which in range(sources) for at in range(4)]
    tuples = {
        "sources": tensors, "results": tensors,
        "levels": (((f"*{dtype}", "i32"),) * levels, [(which, 0) for which in range(levels)]),
    }  # fmt: skip
    for kernel in ("gather", "spread"):
        function = getattr(cells, f"{kernel}_kernel")
        made = compilation(function, constants, dtype, {}, SIZES, architecture, chosen.warps, STAGES, tuples)
        yield described(kernel, form + " ragged" * ragged, architecture, itemsize, width, chosen[:2], made)


if __name__ == "__main__":
    main(asked, SHAPES)
