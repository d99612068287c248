"""The kernels of the relative term: against float64, their counts and their refusals."""

from __future__ import annotations

import pytest
import torch

from ctxbench.implementations._shared.relative_table import Stair, visible_pairs
from ctxbench.implementations.transformer_xl import METHOD
from ctxbench.method import Dims


def test_all_gradients_agree_with_float64_in_the_interpreter(program, wrong) -> None:
    rows = program("relative_parity.py", interpret=True)
    assert len(rows) == 22
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_all_gradients_agree_with_float64_on_the_device(program, wrong) -> None:
    rows = program("relative_parity.py", interpret=False)
    assert {dtype for _case, dtype, _errors in rows} == {"bf16", "fp16", "fp32"}
    assert not wrong(rows)


def seen_one_by_one(rows: int, keys: int, stair: Stair) -> int:
    count = 0
    for row in range(rows):
        place = row + stair.past
        begin = (row + stair.phase) // stair.segment * stair.segment - stair.phase + stair.past
        low = place - stair.memory + 1 if stair.band else begin - stair.memory
        count += sum(max(low, 0) <= key and (key <= place or not stair.causal) for key in range(keys))
        made = stair.known + max(0, begin - stair.memory) // stair.rate
        count += min(made, stair.capacity)
    return count


@pytest.mark.parametrize(
    "stair",
    [
        Stair(),
        Stair(causal=0),
        Stair(memory=9, past=9),
        Stair(7, 5),
        Stair(7, 12, past=16, phase=4),
        Stair(7, 5, past=3, phase=3, band=1),
        Stair(4, 6, capacity=5, rate=2),
        Stair(6, 3, past=5, phase=2, known=4, capacity=9, rate=3),
    ],
)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_visible_pairs_are_counted_one_by_one(stair: Stair, rows: int) -> None:
    keys = rows + stair.past
    assert visible_pairs(rows, keys, stair) == seen_one_by_one(rows, keys, stair)


@pytest.mark.parametrize(
    ("width", "changes", "reason"),
    [
        (64, {}, ""),
        (64, {"device": "cpu"}, "runs on cuda"),
        (64, {"dtype": "fp64"}, "compute in fp32, bf16, fp16, not in fp64"),
        (136, {"dtype": "fp32"}, "at most 128 channels, received 136"),
        (128, {}, ""),
        (136, {}, "at most 128 channels, received 136"),
        (64, {"mode": "decode"}, "has the modes forward, train, stream"),
        (128, {"dtype": "fp32"}, ""),
    ],
)
def test_support_says_why_not(monkeypatch, width: int, changes: dict[str, str], reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    dims = Dims(seq_len=64, d_model=2 * width, num_heads=2, position="transformer_xl")
    asked = {"mode": "forward", "device": "cuda", "dtype": "bf16"} | changes
    answer = METHOD.impl_support(
        METHOD.impl("triton"), asked["mode"], dims, METHOD.params(), asked["device"], asked["dtype"]
    )
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
