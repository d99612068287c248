"""Compile the decoding kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_decode.py ARCHITECTURE:ITEMSIZE:WIDTH ...``; with a ring, causal and grouped, which holds every path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from compile_flash import compile_function, report

from ctxbench.implementations._shared import decode_kernels, decode_table
from ctxbench.implementations._shared.flash_table import chunk, padded

SIZES = ("heads", "T", "capacity", "keys", "start", "sinks", "chunk", "parts")


def compile_kernel(kernel: str, width: int, itemsize: int, architecture: int) -> Any:
    """Pointers and strides are marked as multiples of 16, as they are at run time."""
    function, chosen = getattr(decode_kernels, f"{kernel}_kernel"), decode_table.config(width, itemsize)
    constants = {
        "D": width, "WIDTH": padded(width), "CHUNK": chunk(width, itemsize), "ROWS": chosen.rows,
        "COLUMNS": chosen.columns, "GROUP": 4, "CAUSAL": True, "RING": True, "PARTS": decode_kernels.PARTS,
    }  # fmt: skip
    pointers = {"LSE": "*fp32", "PARTIAL_LSE": "*fp32", "PARTIAL": "*fp32"}
    if kernel == "partial":
        pointers["OUT"] = "*fp32"
    return compile_function(
        function, constants, {2: "bf16", 4: "fp32"}[itemsize], pointers, SIZES, architecture,
        chosen.warps if kernel == "partial" else 1, chosen.stages,
    )  # fmt: skip


def asked(wanted: list[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    for item in wanted:
        architecture, itemsize, width = map(int, item.split(":"))
        for kernel in ("partial", "merge"):
            row = {"kernel": kernel, "architecture": architecture, "itemsize": itemsize, "width": width}
            yield row, compile_kernel(kernel, width, itemsize, architecture)


if __name__ == "__main__":
    report(asked(sys.argv[1:]))
