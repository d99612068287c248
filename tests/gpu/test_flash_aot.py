"""The flash kernels as machine code of devices that need not be here: no spills, matrix instructions, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_flash.py")
SHARED = {90: 232448, 80: 101376}  # bytes a block may have; the second is what devices of capability 8.6 and 8.9 have
# architecture:bytes of an element:width[/form]. The widest heads, where the limits bind, and a width that is padded.
BINDING = ["90:2:64", "90:2:128", "80:2:128", "90:4:64", "80:4:64", "90:2:96", "90:2:128/steps", "80:2:128/steps"]
OTHERS = [f"{architecture}:{size}:{width}" for architecture in (90, 80) for size in (2, 4) for width in (16, 32)]


@pytest.mark.parametrize(
    "wanted", [BINDING, pytest.param([*OTHERS, "80:2:64"], marks=pytest.mark.slow)], ids=["binding", "others"]
)
def test_machine_code_has_matrix_instructions_and_no_spills(wanted: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, PROGRAM, *wanted], capture_output=True, text=True, check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 3 * len(wanted)
    for row in rows:
        assert row["stack"] == 0, row
        assert row["spills"] == 0, row
        assert row["shared"] <= SHARED[row["architecture"]], row
        # float32 by three products of TF32 takes the older instruction where tiles are small.
        wgmma_expected = row["architecture"] == 90 and row["itemsize"] == 2
        assert row["wgmma" if wgmma_expected else "products"] > 0, row
