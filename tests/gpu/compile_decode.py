"""Compile the decoding kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_decode.py ARCHITECTURE:ITEMSIZE:WIDTH ...``; with a ring, causal and grouped, which holds every path.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from typing import Any

import triton
from compile_flash import examine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxbench.implementations._shared import decode, decode_table
from ctxbench.implementations._shared.flash_table import padded

SIZES = ("heads", "T", "capacity", "keys", "start", "sinks", "chunk", "parts")
WARPS = {"partial": 4, "merge": 1}


def compile_kernel(kernel: str, width: int, itemsize: int, architecture: int) -> Any:
    """Pointers and strides are marked as multiples of 16, as they are at run time."""
    function, chosen = getattr(decode, f"{kernel}_kernel"), decode_table.config(width, itemsize)
    constants = {
        "D": width, "WIDTH": padded(width), "ROWS": chosen.rows, "COLUMNS": chosen.columns, "GROUP": 4, "CAUSAL": True,
        "RING": True, "PARTS": decode.PARTS,
    }  # fmt: skip
    pointers = {"LSE": "*fp32", "PARTIAL_LSE": "*fp32", "PARTIAL": "*fp32"}
    if kernel == "partial":
        pointers["OUT"] = "*fp32"
    dtype = {2: "*bf16", 4: "*fp32"}[itemsize]
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], values[index,] = "constexpr", constants[name]
        elif name in SIZES or name == "scale":
            signature[name] = "fp32" if name == "scale" else "i32"
        else:
            signature[name] = "i32" if name.islower() else pointers.get(name, dtype)
            aligned[index,] = [["tt.divisibility", 16]]
    options = {"num_warps": WARPS[kernel], "num_stages": chosen.stages}
    with contextlib.redirect_stdout(io.StringIO()):  # a failing assembler prints the whole program
        source = ASTSource(function, signature, values, aligned)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main(wanted: list[str]) -> None:
    for item in wanted:
        architecture, itemsize, width = map(int, item.split(":"))
        for kernel in WARPS:
            row = {"kernel": kernel, "architecture": architecture, "itemsize": itemsize, "width": width}
            print(json.dumps(row | examine(compile_kernel(kernel, width, itemsize, architecture))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
