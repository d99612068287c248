"""Compile the kernels of the relative term for devices that are not here, and print what the machine code shows.

``python compile_relative.py [ARCHITECTURE:ITEMSIZE:WIDTH[/entries] ...]`` prints JSON lines; without arguments of the
whole shipped table. Causal, over segments, with
the gradients of a key's own segment apart, which holds every path; ``entries``: a second stream too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from compile_flash import compile_function, report

from ctxbench.implementations._shared import relative_backward, relative_kernels, relative_table

SIZES = ("heads", "T", "S", "distances", "nearest", "past", "phase", "segment", "memory", "entries", "known",
         "capacity", "rate", "splits")  # fmt: skip
POINTERS = dict.fromkeys(("LSE", "DELTA", "DU", "DW", "DR"), "*fp32")


def compile_kernel(kernel: str, width: int, itemsize: int, architecture: int, far: bool) -> tuple[Any, Any]:
    chosen = relative_table.tile(kernel, width, itemsize, architecture, far)
    constants = {
        "D": width, "WIDTH": relative_table.padded(width), "CHUNK": relative_table.chunk(width, itemsize),
        "SIDE": chosen.side, "BAND": False, "CAUSAL": True,
        "FAR": far, "SPLIT": not far,
    }  # fmt: skip
    module = relative_kernels if kernel == "forward" else relative_backward
    function = getattr(module, f"relative_{kernel}_kernel")
    dtype = {2: "bf16", 4: "fp32"}[itemsize]
    return chosen, compile_function(
        function, constants, dtype, POINTERS, SIZES, architecture, chosen.warps, chosen.stages
    )


def asked(wanted: list[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    everything = [
        f"{arch}:{size}:{width}{form}"
        for arch, table in relative_table.CONFIGS.items()
        for size, width in table
        for form in ("", "/entries")
    ]
    for item in wanted or everything:
        target, _, form = item.partition("/")
        architecture, itemsize, width = map(int, target.split(":"))
        for kernel in relative_table.KERNELS:
            chosen, compiled = compile_kernel(kernel, width, itemsize, architecture, form == "entries")
            row = {"kernel": kernel, "architecture": architecture, "itemsize": itemsize, "width": width, "form": form}
            yield row | chosen._asdict(), compiled


if __name__ == "__main__":
    report(asked(sys.argv[1:]))
