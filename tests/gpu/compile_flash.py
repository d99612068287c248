"""Compile the flash kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_flash.py [--list] [ARCHITECTURE:ITEMSIZE:WIDTH[/FORM] ...]``; without targets the whole shipped table.
A band is bounded on both sides, which holds every path of its other forms; ``steps`` is the most that one softmax
spans, the others are a band with a bias, with keys hidden by their positions, with four heads a head of keys, and lists
of blocks, without a bias and with a table of them. Where there is no bias, queries may be ``turned``; ``turn`` turns
keys, by form ``rows``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from machine import DTYPES, Compilation, Made, compilation, described, main

from ctxbench.implementations._shared import flash, flash_bias, flash_lists, flash_table, flash_turned, lines

FORMS = {  # kinds of the lines of each range
    "band": ((lines.SLOPE, lines.SLOPE, lines.PLAIN, 1),),
    "steps": ((lines.STEPS, lines.STEPS, lines.PLAIN, 1),) * flash_table.MOST_RANGES,
    "slopes": ((lines.SLOPE, lines.SLOPE, lines.SLOPES, 1),),
    "table": ((lines.SLOPE, lines.SLOPE, lines.TABLE, 1),),
    "hidden": ((lines.SLOPE, lines.SLOPE, lines.PLAIN, 0),),
    "groups": ((lines.SLOPE, lines.SLOPE, lines.PLAIN, 1),),
    "lists": ((lines.OPEN, lines.OPEN, lines.PLAIN, 1),),
    "lists-table": ((lines.OPEN, lines.OPEN, lines.TABLE, 1),),
}
# All other pointers have the dtype of the cell, all other integers are strides.
POINTERS = dict.fromkeys(("LSE", "GRAD_LSE", "DELTA", "BIASES", "SUMS", "COS", "SIN"), "*fp32") | dict.fromkeys(
    ("OFFSETS", "LISTED"), "*i32"
)
SIZES = ("heads", "T", "S", "farthest", "size", "ahead", "count")
LISTED_BLOCK = 64  # tokens of a block of lists
TURNED = ("band", "steps", "hidden")  # forms whose queries may be turned


def of_kernel(kernel: str, width: int, itemsize: int, architecture: int, form: str) -> tuple[Any, Compilation]:
    """One kernel for ranges with lines and biases of the kinds of a form (dK and dV: of the first), at its tiles."""
    kinds, heavy, dtype = FORMS[form], form not in ("band", "groups"), DTYPES[itemsize]
    function = getattr({"table": flash_bias, "turned": flash_turned}.get(kernel, flash), f"{kernel}_kernel")
    chosen = flash_table.config(kernel, width, itemsize, architecture, heavy, form == "groups", form == "table")
    if form.startswith("lists"):
        function, table = getattr(flash_lists, f"listed_{kernel}_kernel"), form == "lists-table"
        chosen = flash_table.listed_config(kernel, width, itemsize, architecture, LISTED_BLOCK, table)
    constants = {
        "D": width, "WIDTH": flash_table.padded(width), "CHUNK": flash_table.chunk(width, itemsize),
        "ROWS": chosen.rows, "COLUMNS": chosen.columns, "KINDS": kinds, "RANGES": len(kinds), "LOW": kinds[0][0],
        "HIGH": kinds[0][1], "BIAS": kinds[0][2], "KNOWN": kinds[0][3], "GROUP": 4 if form == "groups" else 1,
        "THROUGH_LSE": True,
    }  # fmt: skip
    line = ("i32",) * 4
    one = (f"*{dtype}", f"*{dtype}", *["i32"] * 8, line, line, "i32", "i32", "*i32")
    fields = range(8)  # of a range: pointers and strides
    tuples: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
        "ranges": ((one,) * len(kinds), [(which, field) for which in range(len(kinds)) for field in fields]),
        "keys": (one, [(field,) for field in fields]),
    }
    made = compilation(
        function, constants, dtype, POINTERS, SIZES, architecture, chosen.warps, chosen.stages, tuples
    )  # fmt: skip
    return chosen, made


def of_turn(width: int, itemsize: int, architecture: int) -> Made:
    """The kernel that turns keys, at its tile."""
    constants = {"D": width, "HALF": flash_table.padded(width) // 2, "HEADS": flash_table.TURN_HEADS, "BACK": False}
    constants["ROWS"] = flash_table.turn_rows(width)
    made = compilation(flash_turned.turn_kernel, constants, DTYPES[itemsize], POINTERS, SIZES, architecture, 4, 3)
    return described("turn", "rows", architecture, itemsize, width, (constants["ROWS"], width), made)


def asked(item: str) -> Iterator[Made]:
    target, _, form = item.partition("/")
    form = form or "band"
    architecture, itemsize, width = map(int, target.split(":"))
    if form == "rows":
        yield of_turn(width, itemsize, architecture)
        return
    kernels = flash_table.KERNELS
    if form.endswith("table"):
        kernels += ("table",)
    elif form in TURNED:
        kernels += ("turned",)
    for kernel in kernels:
        chosen, made = of_kernel(kernel, width, itemsize, architecture, form)
        yield described(kernel, form, architecture, itemsize, width, chosen[:2], made)


def everything() -> Iterator[str]:
    """Every line of the tables of launch parameters, in the form that it was made for."""
    for architecture, table in flash_table.CONFIGS.items():
        yield from (f"{architecture}:{size}:{width}" for size, width in table)
        yield from (f"{architecture}:{size}:{width}/rows" for size, width in table)
        for size, limits in flash_table.OF_TABLE.items():
            yield from (f"{architecture}:{size}:{limit // size}/table" for limit in limits)
    for architecture, size, width in {(key[0], *key[2:]): None for key in flash_table.HEAVY}:
        yield f"{architecture}:{size}:{width}/steps"
    yield from (f"{architecture}:{size}:{width}/groups" for architecture, size, width in flash_table.GROUPED)
    for architecture, size, width, table in flash_table.LISTED:
        yield f"{architecture}:{size}:{width}/lists{'-table' * table}"


if __name__ == "__main__":
    main(asked, everything())
