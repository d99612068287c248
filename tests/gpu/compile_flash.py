"""Compile the flash kernels for devices that are not here, and print what the machine code shows, as JSON lines.

``python compile_flash.py [ARCHITECTURE:ITEMSIZE:WIDTH[/FORM] ...]``; without arguments the whole shipped table. A band
is bounded on both sides, which holds every path of its other forms; ``steps`` is the most that one softmax spans, the
others are a band with a bias, with keys hidden by their positions, with four heads a head of keys, and lists of blocks,
without a bias and with a table of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxbench.implementations._shared import flash, flash_bias, flash_lists, flash_table, lines
from ctxbench.method import DTYPE_BYTES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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
POINTERS = dict.fromkeys(("LSE", "GRAD_LSE", "DELTA", "BIASES", "SUMS"), "*fp32") | dict.fromkeys(
    ("OFFSETS", "LISTED"), "*i32"
)
SIZES = ("heads", "T", "S", "farthest", "size", "ahead")
LISTED_BLOCK = 64  # tokens of a block of lists


def compile_kernel(
    kernel: str, width: int, dtype: str, architecture: int, chosen: flash_table.Config, form: str = "band"
) -> Any:
    """Compile one kernel for ranges with lines and biases of the kinds of a form (dK and dV: of the first).

    Pointers and strides are marked as multiples of 16, as they are at run time.
    """
    kinds = FORMS[form]
    function = getattr(flash_bias if kernel == "table" else flash, f"{kernel}_kernel")
    if form.startswith("lists"):
        function = getattr(flash_lists, f"listed_{kernel}_kernel")
    constants = {
        "D": width, "WIDTH": flash_table.padded(width), "CHUNK": flash_table.chunk(width, DTYPE_BYTES[dtype]),
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
    return compile_function(
        function, constants, dtype, POINTERS, SIZES, architecture, chosen.warps, chosen.stages, tuples
    )


def compile_function(
    function: Any, constants: Mapping[str, Any], dtype: str, pointers: Mapping[str, str], sizes: Collection[str],
    architecture: int, warps: int, stages: int, tuples: Mapping[str, tuple[Any, list[tuple[int, ...]]]] | None = None,
) -> Any:  # fmt: skip
    """Compile a kernel whose pointers are in capitals, to ``dtype`` unless ``pointers`` says otherwise.

    ``sizes`` are integers that are multiples of nothing, ``scale`` is a float, ``tuples`` come with their type and the
    paths to their pointers and strides; all other arguments are strides.
    """
    signature, values, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        name, paths = parameter.name, []
        if parameter.is_constexpr:
            signature[name], values[index,] = "constexpr", constants[name]
        elif name in sizes or name == "scale":
            signature[name] = "fp32" if name == "scale" else "i32"
        elif tuples and name in tuples:
            signature[name], paths = tuples[name]
        else:
            signature[name], paths = "i32" if name.islower() else pointers.get(name, f"*{dtype}"), [()]
        for path in paths:
            attributes[index, *path] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    with contextlib.redirect_stdout(io.StringIO()):  # a failing assembler prints the whole program
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def examine(made: Iterable[tuple[dict[str, Any], Any]]) -> Iterator[dict[str, Any]]:
    """Rows, each with registers, stack, spills, shared memory and matrix instructions of its compiled kernel."""
    for architecture, group in groupby(made, key=lambda one: one[0]["architecture"]):
        rows, kernels = zip(*group, strict=True)
        listings = disassembled([kernel.asm["cubin"] for kernel in kernels], architecture)
        for row, kernel, listing in zip(rows, kernels, listings, strict=True):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                usage = run("cuobjdump", "--dump-resource-usage", file.name)
            resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
            yield row | {
                "registers": int(resources["REG"]),
                "stack": int(resources["STACK"]),
                "spills": count(listing, "LDL|STL"),
                "shared": kernel.metadata.shared,
                "wgmma": count(listing, "HGMMA"),
                "products": count(listing, "HG?MMA"),
            }


def count(listing: list[str], names: str) -> int:
    """How many instructions have one of these names."""
    return sum(bool(re.search(rf"\b(?:{names})\b", instruction)) for instruction in listing)


def disassembled(cubins: list[bytes], architecture: int) -> Iterator[list[str]]:
    """The instructions of each kernel; of all in one go, because the disassembler takes half a second to begin."""
    codes = [code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        text = run("nvdisasm", "--binary", f"SM{architecture}{'a' * (architecture == 90)}", file.name)
    listing = iter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text))
    for each in codes:
        yield [next(listing) for _ in range(0, len(each), 16)]  # bytes of an instruction
    assert next(listing, None) is None, "more instructions than the kernels hold"


def code(cubin: bytes) -> bytes:
    """The section of an ELF file that holds the machine code of its one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, sections, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(sections)]
    (found,) = (header for header in headers if cubin.startswith(b".text.", headers[names][4] + header[0]))
    return cubin[found[4] : found[4] + found[5]]


def run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def report(made: Iterable[tuple[dict[str, Any], Any]]) -> None:
    for row in examine(made):
        print(json.dumps(row), flush=True)


def asked(wanted: list[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    everything = [f"{arch}:{size}:{width}" for arch, table in flash_table.CONFIGS.items() for size, width in table]
    for item in wanted or everything:
        target, _, form = item.partition("/")
        form = form or "band"
        architecture, itemsize, width = map(int, target.split(":"))
        for kernel in (*flash_table.KERNELS, "table") if form.endswith("table") else flash_table.KERNELS:
            heavy = form not in ("band", "groups")
            chosen = flash_table.config(kernel, width, itemsize, architecture, heavy, grouped=form == "groups")
            if form.startswith("lists"):
                table = form == "lists-table"
                chosen = flash_table.listed_config(kernel, width, itemsize, architecture, LISTED_BLOCK, table)
            dtype = {2: "bf16", 4: "fp32"}[itemsize]
            compiled = compile_kernel(kernel, width, dtype, architecture, chosen, form)
            row = {"kernel": kernel, "architecture": architecture, "itemsize": itemsize, "width": width, "form": form}
            yield row | chosen._asdict(), compiled


if __name__ == "__main__":
    report(asked(sys.argv[1:]))
