"""Write docs/kernels.md from what the compiler says of the kernels: registers, shared memory, matrix instructions.

``python tests/gpu/compile_flash.py [TARGET ...] | python docs/kernels.py [--fresh]``, and likewise with the other
programs ``compile_*``. Rows that are not in the input stay, but where ``--fresh``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("kernels.md")
KEY = ("kernel", "form", "architecture", "itemsize", "width")
HEADS = (*KEY, "tile", "warps", "stages", "registers", "shared", "products", "copies", "stack", "mark")
HEAD = """# Kernels

What ptxas makes of every Triton kernel at every shipped launch parameter, by bytes of an element and padded head width.
Registers are those of a thread, shared memory is a block's in bytes, products are matrix instructions in the listing,
copies those that bring a tile while another is computed. HGMMA is a Hopper's own, for tiles of 64 rows; HMMA stands
where larger tiles would spill. In float32 a product is three of TF32. A tile is queries x keys. Heads of more than 128
channels in fp32, in the relative term of more than 32, take the channels of scores and their gradient 32 at a time.
Nothing spills and nothing is added atomically in memory.

A mark is of all that goes into a compilation: the kernel's code and what it calls, its constants, types, warps and
stages. A test computes the marks of all shipped kernels and holds them against this page, so no kernel or launch
parameter changes without being compiled again; others compile a part of these rows and expect the same figures.

Forms of attention: `band` is one range with a bound on both sides; `steps` is three ranges between lines of any kind;
`slopes` and `table` are a band with ALiBi or T5's bias (kernel `table`: its gradient); `hidden` is a band with keys
hidden by position, `groups` one with four query heads a head of keys; `lists` are lists of blocks of 64, `lists-table`
those with T5's bias. Kernel `turned` is forward of queries that it rotates first, `turn`, by form `rows`, rotates keys:
its tile is rows x channels, and there is nothing to multiply. `relative` is Transformer-XL's term over all segments
(`entries`: with compressed ones in front; kernel `dr`: gradient of distances), `decode` one query over parts of a long
cache and the merge of the parts, `clusters` attention inside clusters with results by token or by slot, the choice of
clusters and the sum over them, `memory` the search for the best pairs of a memory, `bank` the gate of a read; its width
is the model's.

Kernels `gather` and `spread` pool keys and values into the cells of all levels, and add cells to their tokens; the form
is the pool factor and the number of coarse levels, `ragged` where the last cell may hold fewer tokens. Their tile is
places of tokens x channels, their width the channels of a token, and there is nothing to multiply.

PyTorch's FlexAttention (impl `flex`) is not on this page: the compiler makes its kernels on the device. What is ours is
its block lists, in closed form from the lines that the kernels here take (`implementations/_shared/flex.py`): dense,
Longformer, LongLoRA, hierarchical and pyramid by tiles of 128 x 128, BigBird with its blocks as tiles, Transformer-XL
with the position term as a tensor that each score reads. Nor are the packages flash-attn-4 and flash-linear-attention,
which are called as they are: of the latter `parallel_attn` alone is one of the methods here, dense causal attention.

Nor are the kernels in C++ for CPUs, impl `native`, for which no list of registers holds anywhere: the compiler of each
machine makes them, for its own instructions; [measuring.md](measuring.md#compiled-kernels) says which one.

By triton 3.6, which comes with PyTorch 2.11, all 671 rows with the marks of 28 November 2026 were compiled too. Nothing
spills or is added atomically there either, no block has more shared memory than its architecture gives, and products
take the same kinds of instructions; registers, shared memory and copies differ from this page in part.

Made with triton {version} by `python tests/gpu/compile_flash.py [TARGET ...] | python docs/kernels.py`, and likewise
with the other programs `compile_*`.
"""


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One line of the page, by column."""
    products = ", ".join(f"{row[name]} {name}" for name in ("HGMMA", "HMMA") if row[name])
    return {name: str((row | {"products": products or "0"})[name]) for name in HEADS}


def parse(page: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The lines of a page by what they are about."""
    found = {}
    for line in page.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("| ") and len(parts) == len(HEADS) and parts[0] != HEADS[0]:
            row = dict(zip(HEADS, parts, strict=True))
            found[tuple(row[name] for name in KEY)] = row
    return found


def write(rows: Iterable[dict[str, str]], version: str) -> str:
    """The page of these lines, in their order of kernel, form and target."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    lines += [f"| {' | '.join(row[name] for name in HEADS)} |" for row in rows]
    return HEAD.format(version=version) + "\n" + "\n".join(lines) + "\n"


def _order(row: dict[str, str]) -> tuple[Any, ...]:
    return row["form"], -int(row["architecture"]), int(row["itemsize"]), int(row["width"]), row["kernel"]


def main() -> None:
    """Put the rows of the input into the page."""
    import triton

    found = parse(PAGE.read_text() if PAGE.exists() and "--fresh" not in sys.argv else "")
    for line in sys.stdin:
        row = cells(json.loads(line))
        found[tuple(row[name] for name in KEY)] = row
    PAGE.write_text(write(sorted(found.values(), key=_order), triton.__version__))


if __name__ == "__main__":
    main()
