"""The flash kernels as machine code of devices that need not be here: no spills, matrix instructions, shared memory."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from ctxbench.implementations._shared import flash_table

SHARED = {90: 232448, 80: 101376}  # bytes a block may have; the second is what devices of capability 8.6 and 8.9 have
# architecture:bytes of an element:width[/form]. The widest heads, where the limits bind, and a width that is padded.
BINDING = ["90:2:64", "90:2:128", "80:2:128", "90:4:64", "80:4:64", "90:2:96", "90:2:256", "80:4:128", "90:4:256"]
FORMS = [
    "90:2:128/steps",
    "90:2:128/table",
    "90:4:64/slopes",
    "90:2:128/lists",
    "80:4:64/lists",
    "80:2:128/lists-table",
    "80:4:256/steps",
    "80:4:256/lists-table",
]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def page() -> Any:
    return runpy.run_path(str(DOCS / "kernels.py"))


@pytest.mark.parametrize("wanted", [BINDING, FORMS], ids=["binding", "forms"])
def test_machine_code_has_matrix_instructions_and_no_spills(wanted: list[str], program: Any, page: Any) -> None:
    rows = program("compile_flash.py", *wanted, interpret=False)
    assert len(rows) == sum(4 if item.endswith("table") else 3 for item in wanted)
    for row in rows:
        assert row["stack"] == 0, row
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED[row["architecture"]], row
        # The older instruction is taken where tiles are small: by float32 as three products of TF32, by the gradient of
        # a table, and by dK and dV of the widest heads, two sums of 64 rows of which would spill.
        small = row["kernel"] == "table" or (row["kernel"] == "dkv" and row["width"] > 128)
        wgmma_expected = row["architecture"] == 90 and row["itemsize"] == 2 and not small
        assert row["wgmma" if wgmma_expected else "products"] > 0, row
    import triton

    text = (DOCS / "kernels.md").read_text()
    if f"triton {triton.__version__} " in text:  # another version's compiler may do otherwise
        listed = page["parse"](text)
        made = [page["cells"](row) for row in rows]
        known = [row for row in made if tuple(row[name] for name in page["KEY"]) in listed]
        assert len(known) >= len(made) - 3, "the padded width is the only one that is not on the page"
        for row in known:
            assert listed[tuple(row[name] for name in page["KEY"])] == row


def test_the_page_has_every_shipped_configuration_and_none_that_spills(page: Any) -> None:
    listed = page["parse"]((DOCS / "kernels.md").read_text())
    assert {row["stack"] for row in listed.values()} == {"0"}
    for architecture, table in flash_table.CONFIGS.items():
        for (itemsize, width), chosen in table.items():
            for kernel, one in zip(flash_table.KERNELS, chosen, strict=True):
                row = listed[kernel, "band", str(architecture), str(itemsize), str(width)]
                shipped = f"{one.rows} x {one.columns}", str(one.warps), str(one.stages)
                assert (row["tile"], row["warps"], row["stages"]) == shipped, row
