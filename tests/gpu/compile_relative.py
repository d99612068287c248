"""Compile the kernels of the relative term for devices that are not here, and print what the machine code shows.

``python compile_relative.py [--list] [ARCHITECTURE:ITEMSIZE:WIDTH[/entries] ...]`` prints JSON lines; without targets
of the whole shipped table. Causal, over segments, with the gradients of a key's own segment apart, which holds every
path; ``entries``: a second stream too.
"""

from __future__ import annotations

from collections.abc import Iterator

from machine import DTYPES, Made, compilation, described, main

from ctxbench.implementations._shared import relative_backward, relative_kernels, relative_table

SIZES = ("heads", "T", "S", "distances", "nearest", "past", "phase", "segment", "memory", "entries", "known",
         "capacity", "rate", "splits")  # fmt: skip
POINTERS = dict.fromkeys(("LSE", "DELTA", "DU", "DW", "DR"), "*fp32")


def asked(item: str) -> Iterator[Made]:
    target, _, form = item.partition("/")
    architecture, itemsize, width = map(int, target.split(":"))
    far = form == "entries"
    for kernel in relative_table.KERNELS:
        chosen = relative_table.tile(kernel, width, itemsize, architecture, far)
        constants = {
            "D": width, "WIDTH": relative_table.padded(width), "CHUNK": relative_table.chunk(width, itemsize),
            "SIDE": chosen.side, "BAND": False, "CAUSAL": True, "FAR": far, "SPLIT": not far,
        }  # fmt: skip
        module = relative_kernels if kernel == "forward" else relative_backward
        made = compilation(
            getattr(module, f"relative_{kernel}_kernel"), constants, DTYPES[itemsize], POINTERS, SIZES, architecture,
            chosen.warps, chosen.stages,
        )  # fmt: skip
        sides = chosen.side, chosen.side
        yield described(kernel, f"relative{' entries' * far}", architecture, itemsize, width, sides, made)


def everything() -> Iterator[str]:
    for architecture, table in relative_table.CONFIGS.items():
        yield from (f"{architecture}:{size}:{width}{form}" for size, width in table for form in ("", "/entries"))


if __name__ == "__main__":
    main(asked, everything())
