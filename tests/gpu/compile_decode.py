"""Compile the decoding kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_decode.py [--list] [ARCHITECTURE:ITEMSIZE:WIDTH ...]``; without targets the whole shipped table. With a
ring, causal and grouped, which holds every path.
"""

from __future__ import annotations

from collections.abc import Iterator

from machine import DTYPES, TARGETS, Made, compilation, described, main

from ctxbench.implementations._shared import decode_kernels, decode_table
from ctxbench.implementations._shared.flash_table import chunk, padded

SIZES = ("heads", "T", "capacity", "keys", "start", "sinks", "chunk", "parts")
WIDTHS = (16, 32, 64, 128, 256)


def asked(item: str) -> Iterator[Made]:
    architecture, itemsize, width = map(int, item.split(":"))
    for kernel in ("partial", "merge"):
        chosen = decode_table.config(width, itemsize)
        constants = {
            "D": width, "WIDTH": padded(width), "CHUNK": chunk(width, itemsize), "ROWS": chosen.rows,
            "COLUMNS": chosen.columns, "GROUP": 4, "CAUSAL": True, "RING": True, "PARTS": decode_kernels.PARTS,
        }  # fmt: skip
        pointers = dict.fromkeys(("LSE", "PARTIAL_LSE", "PARTIAL"), "*fp32")
        if kernel == "partial":
            pointers["OUT"] = "*fp32"
        made = compilation(
            getattr(decode_kernels, f"{kernel}_kernel"), constants, DTYPES[itemsize], pointers, SIZES, architecture,
            chosen.warps if kernel == "partial" else 1, chosen.stages,
        )  # fmt: skip
        tile = chosen[:2] if kernel == "partial" else (decode_kernels.PARTS, padded(width))
        yield described(kernel, "decode", architecture, itemsize, width, tile, made)


def everything() -> Iterator[str]:
    return (f"{architecture}:{itemsize}:{width}" for architecture, itemsize in TARGETS for width in WIDTHS)


if __name__ == "__main__":
    main(asked, everything())
