"""Write docs/kernels.md from what the compiler says of the kernels: registers, shared memory, matrix instructions.

``python tests/gpu/compile_flash.py [TARGET ...] | python docs/kernels.py``. Rows that are not in the input stay.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("kernels.md")
KEY = ("kernel", "form", "architecture", "itemsize", "width")
HEADS = (*KEY, "tile", "warps", "stages", "registers", "shared", "products", "stack")
HEAD = """# Kernels

What ptxas makes of the kernels in `implementations/_shared/flash*.py` and `cells.py`, by bytes of an element and padded
head width, at the shipped launch parameters. Registers are those of a thread, shared memory is a block's in bytes,
products are matrix instructions in the listing: HGMMA on sm_90 in 16 bits, HMMA elsewhere and for dK and dV of
more than 128 channels, where tiles large enough for HGMMA would spill. A tile is queries x keys. Heads of more than 128
channels in fp32 take the channels of scores and their gradient 32 at a time. Nothing spills: a test compiles a part of
these rows and holds them against this page.

Forms: `band` is one range with a bound on both sides; `steps` is three ranges between lines of any kind; `slopes` and
`table` are a band with ALiBi or T5's bias (kernel `table`: its gradient); `hidden` is a band with keys hidden by
position, `groups` one with four query heads a head of keys; `lists` are lists of blocks of 64, `lists-table` those with
T5's bias.

Kernels `gather` and `spread` pool keys and values into the cells of all levels, and add cells to their tokens; the form
is the pool factor and the number of coarse levels, `ragged` where the last cell may hold fewer tokens. Their tile is
places of tokens x channels, their width the channels of a token, and there is nothing to multiply.

PyTorch's FlexAttention (impl `flex`) is not on this page: the compiler makes its kernels on the device. What is ours is
its block lists, in closed form from the lines that the kernels here take (`implementations/_shared/flex.py`): dense,
Longformer, LongLoRA, hierarchical and pyramid by tiles of 128 x 128, BigBird with its blocks as tiles, Transformer-XL
with the position term as a tensor that each score reads. Nor are the packages flash-attn-4 and flash-linear-attention,
which are called as they are: of the latter `parallel_attn` alone is one of the methods here, dense causal attention.

Made with triton {version} by `python tests/gpu/compile_flash.py [TARGET ...] | python docs/kernels.py`, and likewise
with `compile_cells.py`.
"""


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One line of the page, by column."""
    values = row | {"tile": f"{row['rows']} x {row['columns']}", "products": row["wgmma"] or row["products"]}
    return {name: str(values[name]) for name in HEADS}


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

    found = parse(PAGE.read_text() if PAGE.exists() else "")
    for line in sys.stdin:
        row = cells(json.loads(line))
        found[tuple(row[name] for name in KEY)] = row
    PAGE.write_text(write(sorted(found.values(), key=_order), triton.__version__))


if __name__ == "__main__":
    main()
