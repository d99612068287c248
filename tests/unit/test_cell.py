"""Identity of a cell: the key is stable, and no two cells share one."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench.cell import Cell
from ctxbench.method import Dims

CELL = Cell(
    method="transformer_xl", impl="blocked", seq_len=4096, memory=512, params={"mem_len": 512, "segment_len": 256}
)


def test_the_key_is_the_same_in_every_version() -> None:
    """A changed key makes every finished run unreadable to --resume: raise PROTOCOL on purpose, then this value."""
    assert CELL.key == "abc98d972f66a1ae"


def test_the_key_does_not_depend_on_the_process() -> None:
    code = (
        "from ctxbench.cell import Cell; print(Cell(method='transformer_xl', impl='blocked', seq_len=4096, memory=512,"
        " params={'segment_len': 256, 'mem_len': 512}).key)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == CELL.key


CHANGES = {
    "method": "dense", "impl": "reference", "mode": "train", "device": "cuda:0", "dtype": "bf16", "batch_size": 2,
    "seq_len": 8192, "d_model": 512, "num_heads": 8, "num_layers": 2, "d_ff": 0, "causal": False, "position": "rope",
    "memory": None, "params": {"mem_len": 512}, "threads": 2,
}  # fmt: skip


@pytest.mark.parametrize("field", Cell.__struct_fields__)
def test_every_field_is_part_of_the_key(field: str) -> None:
    changed = msgspec.structs.replace(CELL, **{field: CHANGES[field]})
    assert changed.key != CELL.key
    assert (changed.series == CELL.series) is (field == "seq_len")


def test_dims_carry_every_shared_size() -> None:
    assert CELL.dims == Dims(seq_len=4096)
    assert msgspec.structs.replace(CELL, dtype="bf16").itemsize == 2
    assert CELL.label() == "transformer_xl / blocked"


@given(st.integers(1, 10**6), st.integers(1, 64), st.sampled_from(["forward", "train"]), st.booleans())
def test_a_cell_survives_json(seq_len: int, batch_size: int, mode: str, causal: bool) -> None:
    cell = Cell(method="m", impl="i", seq_len=seq_len, batch_size=batch_size, mode=mode, causal=causal)
    again = msgspec.json.decode(msgspec.json.encode(cell), type=Cell)
    assert again == cell
    assert again.key == cell.key
