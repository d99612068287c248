"""Every shipped kernel as machine code of devices that need not be here; see ``machine`` and docs/kernels.md.

The page speaks of all of them, and its marks show that it speaks of those that are there now; some are compiled.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = {"90": 232448, "80": 101376}  # bytes a block may have; the second is what capability 8.6 and 8.9 have
PROGRAMS = ("flash", "relative", "decode", "gather", "cells")
# Compiled here: architecture:bytes of an element:width[/form], where the limits bind, of every program some, and
# widths that are padded, which are not on the page.
COMPILED = {
    "flash": ["90:2:64", "90:2:128", "80:4:64", "90:2:256", "90:2:128/steps", "90:2:128/table", "80:4:64/slopes",
              "80:2:128/groups", "90:2:128/lists", "90:2:96", "90:2:64/rows"],
    "relative": ["90:2:64", "80:2:64/entries", "90:4:128/entries"],
    "decode": ["90:2:128", "80:4:256"],
    "gather": ["90:2:128", "80:4:128/slots", "90:4:16/tokens", "90:2:64/gate", "90:2:96/tokens"],
    "cells": ["90:2:64/4-2", "90:2:-512/3-5", "80:4:64/22-2"],
}  # fmt: skip
PADDED = "96"
OF_FLASH = ("band", "steps", "slopes", "table", "hidden", "groups", "lists", "lists-table", "rows")
WITHOUT_PRODUCTS = ("merge", "taken", "add", "picked", "gather", "spread", "turn")
UNPIPELINED = (*WITHOUT_PRODUCTS, "search")  # nothing to bring ahead, or a loop with a loop inside
DOCS = Path(__file__).parents[2] / "docs"

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def page() -> Any:
    return runpy.run_path(str(DOCS / "kernels.py"))


@pytest.fixture(scope="module")
def listed(page: Any) -> dict[tuple[str, ...], dict[str, str]]:
    return page["parse"]((DOCS / "kernels.md").read_text())


def test_the_page_has_every_shipped_kernel_as_it_is_now(program: Any, page: Any, listed: Any) -> None:
    # Of the flash kernels it has more than one form for the same launch parameters.
    more = {f"{row['architecture']}:{row['itemsize']}:{row['width']}/{row['form']}" for row in listed.values()
            if row["form"] in OF_FLASH}  # fmt: skip
    runs = [(name, ()) for name in PROGRAMS] + [("flash", sorted(more))]
    shipped: Rows = [
        row for name, which in runs for row in program(f"compile_{name}.py", "--list", *which, interpret=False)
    ]
    about = {tuple(str(row[name]) for name in page["KEY"]): row for row in shipped}
    assert about.keys() == listed.keys()
    for key, row in about.items():
        assert {name: str(value) for name, value in row.items()}.items() <= listed[key].items(), "compile it again"


def test_no_kernel_on_the_page_spills_or_is_too_large_and_products_take_matrix_instructions(listed: Any) -> None:
    for row in listed.values():
        assert row["stack"] == "0", row
        assert int(row["shared"]) <= SHARED[row["architecture"]], row
        taken = {one.split()[1] for one in row["products"].split(", ") if one != "0"}
        assert bool(taken) is (row["kernel"] not in WITHOUT_PRODUCTS), row
        assert ("HGMMA" in taken) is takes_64_rows(row), row
        assert (row["copies"] != "0") is (row["stages"] != "1" and row["kernel"] not in UNPIPELINED), row


def takes_64_rows(row: dict[str, str]) -> bool:
    """Whether products have as many rows as a Hopper's own instruction takes."""
    first, *rest = map(int, row["tile"].split(" x "))
    rows = rest[0] if row["kernel"] == "dkv" and "relative" not in row["form"] else first
    return row["architecture"] == "90" and rows >= 64 and row["kernel"] not in WITHOUT_PRODUCTS


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_again_kernels_are_what_the_page_says(
    name: str, program: Callable[..., Rows], page: Any, listed: Any
) -> None:
    rows = program(f"compile_{name}.py", *COMPILED[name], interpret=False)
    import triton

    same = f"triton {triton.__version__} " in (DOCS / "kernels.md").read_text()
    for row in rows:
        assert row["stack"] == row["spills"] == row["atomics"] == 0, row
        assert row["shared"] <= SHARED[str(row["architecture"])], row
        made = page["cells"](row)
        key = tuple(made[name] for name in page["KEY"])
        assert (key in listed) is (made["width"] != PADDED), row
        if same and key in listed:  # another version's compiler may do otherwise
            assert listed[key] == made
