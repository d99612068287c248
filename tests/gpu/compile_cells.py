"""Compile the pooling kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_cells.py ARCHITECTURE:ITEMSIZE:WIDTH/POOL-LEVELS ...``; see ``compile_flash``. Of keys and values,
divided, which holds every path but the number of tokens of a ragged cell: that is compiled where WIDTH is negative, one
tensor of as many channels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from compile_flash import compile_function, report

from ctxbench.implementations._shared import cells, cells_table

SIZES = ("heads", "T", "shift")
STAGES = 3  # what Triton takes where nobody asks; there is no loop to pipeline
KERNELS = ("gather", "spread")


def compile_kernel(kernel: str, width: int, itemsize: int, architecture: int, pool: int, levels: int) -> Any:
    """Pointers and strides are marked as multiples of 16, as they are at run time."""
    ragged, width, dtype = width < 0, abs(width), {2: "*bf16", 4: "*fp32"}[itemsize]
    chosen, sources = cells_table.config(pool, levels, width), 1 if ragged else 2
    constants = {
        "SOURCES": sources, "LEVELS": levels, "POOL": pool, "PADDED": cells_table.digit(pool), "D": width,
        "ROWS": chosen.rows, "WIDTH": chosen.width, "MEAN": True, "RAGGED": ragged,
    }  # fmt: skip
    tensors = ((dtype, *["i32"] * 3),) * sources, [(which, field) for which in range(sources) for field in range(4)]
    tuples = {
        "sources": tensors, "results": tensors,
        "levels": (((dtype, "i32"),) * levels, [(which, 0) for which in range(levels)]),
    }  # fmt: skip
    function = getattr(cells, f"{kernel}_kernel")
    return compile_function(
        function, constants, dtype[1:], {}, SIZES, architecture, chosen.warps, STAGES, tuples
    )  # fmt: skip


def asked(wanted: list[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    for item in wanted:
        target, _, form = item.partition("/")
        architecture, itemsize, width = map(int, target.split(":"))
        pool, levels = map(int, form.split("-"))
        chosen = cells_table.config(pool, levels, abs(width))
        for kernel in KERNELS:
            row = {"kernel": kernel, "architecture": architecture, "itemsize": itemsize, "width": abs(width)}
            row |= {"form": form + " ragged" * (width < 0), "rows": chosen.rows, "columns": chosen.width}
            yield (
                row | {"warps": chosen.warps, "stages": STAGES},
                compile_kernel(kernel, width, itemsize, architecture, pool, levels),
            )


if __name__ == "__main__":
    report(asked(sys.argv[1:]))
