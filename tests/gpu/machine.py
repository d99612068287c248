"""Kernels as machine code of devices that are not here: what is compiled, what becomes of it, and a mark of it.

A *mark* is of all that goes into a compilation: the code of a kernel and of what it calls, without comments, its
compile-time constants, the types of its arguments, warps and stages. So a page of what the compiler said shows without
compiling anything whether it speaks of the kernels that are there.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {2: "bf16", 4: "fp32"}
AT_ONCE = 32  # kernels that are disassembled together
TARGETS = tuple((architecture, itemsize) for architecture in (90, 80) for itemsize in (2, 4))


class Compilation(NamedTuple):
    """A kernel with everything but its arguments."""

    function: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    architecture: int
    warps: int
    stages: int

    def compile(self) -> Any:
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        with contextlib.redirect_stdout(io.StringIO()):  # a failing assembler prints the whole program
            return triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)

    @property
    def mark(self) -> str:
        said = (sorted(code_of(self.function).items()), *self[1:])
        return hashlib.sha256(repr(said).encode()).hexdigest()[:8]


@cache
def code_of(function: Any) -> Mapping[str, str]:
    """Sources of a kernel and of all it calls, and the constants it takes from its module, by name."""
    tree = ast.parse(function.src)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    found = {f"{function.__module__}.{function.__name__}": ast.unparse(tree)}
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        used = function.fn.__globals__.get(name)
        if isinstance(used, JITFunction):
            if used is not function:
                found |= code_of(used)
        elif isinstance(used, tl.constexpr):
            found[f"{function.__module__}.{name}"] = repr(used.value)
    return found


def compilation(
    function: Any, constants: Mapping[str, Any], dtype: str, pointers: Mapping[str, str], sizes: Collection[str],
    architecture: int, warps: int, stages: int, tuples: Mapping[str, tuple[Any, list[tuple[int, ...]]]] | None = None,
) -> Compilation:  # fmt: skip
    """Of a kernel whose pointers are in capitals, to ``dtype`` unless ``pointers`` says otherwise.

    ``sizes`` are integers that are multiples of nothing, ``scale`` is a float, ``tuples`` come with their type and the
    paths to their pointers and strides; all other arguments are strides. Pointers and strides are multiples of 16.
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
    return Compilation(function, signature, values, attributes, architecture, warps, stages)


Made = tuple[dict[str, Any], Compilation]  # what a line is about, and what it says is of


def described(
    kernel: str, form: str, architecture: int, itemsize: int, width: int, tile: Collection[int], made: Compilation
) -> Made:  # fmt: skip
    """A line of the page before its figures."""
    row = {"kernel": kernel, "form": form, "architecture": architecture, "itemsize": itemsize, "width": width}
    row |= {"tile": " x ".join(map(str, tile)), "warps": made.warps, "stages": made.stages, "mark": made.mark}
    return row, made


def examine(made: Iterable[Made]) -> Iterator[dict[str, Any]]:
    """Rows, each with registers, stack, spills, shared memory and some instructions of its compiled kernel."""
    some = groupby(enumerate(made), key=lambda one: (one[1][1].architecture, one[0] // AT_ONCE))
    for (architecture, _), group in some:
        rows, compilations = zip(*(one for _, one in group), strict=True)
        kernels = [one.compile() for one in compilations]
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
                "HGMMA": count(listing, "HGMMA"),
                "HMMA": count(listing, "HMMA"),
                "copies": count(listing, "LDGSTS"),
                "atomics": count(listing, "ATOMG|ATOM|RED|REDG"),
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


def main(asked: Callable[[str], Iterator[Made]], everything: Iterable[str]) -> None:
    """Print JSON lines of the targets that are named, or of everything; with ``--list`` compile nothing.

    ``--targets`` prints their names alone.
    """
    wanted = [item for item in sys.argv[1:] if not item.startswith("--")]
    if "--targets" in sys.argv:
        print(*(wanted or everything), sep="\n")
        return
    made = (one for item in wanted or everything for one in asked(item))
    for row in (row for row, _ in made) if "--list" in sys.argv else examine(made):
        print(json.dumps(row), flush=True)
