"""The pooling kernels: against float64, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from ctxbench.implementations._shared import cells_table
from ctxbench.implementations.hierarchical.params import WIDEST_CELL
from ctxbench.method import Dims
from ctxbench.registry import discover


def test_kernels_agree_with_float64_in_the_interpreter(program, wrong) -> None:
    rows = program("cells_parity.py", interpret=True)
    assert len(rows) == 40
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_kernels_agree_with_float64_on_the_device(program, wrong) -> None:
    rows = program("cells_parity.py", interpret=False)
    assert {row[1] for row in rows} == {"bf16", "fp16", "fp32"}
    assert not wrong(rows)


@pytest.mark.parametrize(("pool", "levels"), [(2, 1), (4, 2), (2, 9), (3, 5), (22, 2), (1024, 1), (5, 3)])
@pytest.mark.parametrize("width", [8, 64, 200, 4096])
def test_a_tile_holds_a_widest_cell_and_fits_its_threads(pool: int, levels: int, width: int) -> None:
    assert cells_table.support(pool, levels)
    chosen = cells_table.config(pool, levels, width)
    assert chosen.rows % cells_table.digit(pool) ** levels == 0
    assert chosen.rows * chosen.width <= 32 * 32 * max(chosen.warps, 1)
    assert chosen.warps <= 16


def test_every_cell_of_hierarchical_attention_fits_a_tile() -> None:
    for pool in range(2, WIDEST_CELL + 1):
        levels = 1
        while pool**levels <= WIDEST_CELL:
            assert cells_table.support(pool, levels), (pool, levels)
            levels += 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pool": 1024}, ""),
        ({"pool": 1025}, "at most 1024 places, received pool=1025"),
        ({"pool": 1025, "levels": 1}, ""),
    ],
)
def test_support_says_why_not(monkeypatch, changes: dict, reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    method, dims = discover()["pyramid"], Dims(seq_len=64, d_model=256, num_layers=3)
    answer = method.impl_support(method.impl("triton"), "forward", dims, method.params(**changes), "cuda", "bf16")
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
