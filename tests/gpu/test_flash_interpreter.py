"""The flash kernels compute what the definition says: in Triton's interpreter on any machine, and on a device."""

from __future__ import annotations

import itertools

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.lines import Line, visible_pairs
from ctxbench.implementations.dense import METHOD
from ctxbench.method import Dims


def test_forward_and_backward_agree_with_float64_in_the_interpreter(program, wrong) -> None:
    rows = program("flash_parity.py", interpret=True)
    assert len(rows) == 54
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_forward_and_backward_agree_with_float64_on_the_device(program, wrong) -> None:
    rows = program("flash_parity.py", interpret=False)
    assert {dtype for _case, dtype, _errors in rows} == {"bf16", "fp16", "fp32"}
    assert not wrong(rows)


@pytest.mark.parametrize(
    ("mode", "causal"), [("forward", True), ("forward", False), ("train", True), ("train", False), ("stream", True)]
)
@pytest.mark.usefixtures("for_triton")
def test_formulas_of_dense_are_what_the_tracer_counts(mode: str, causal: bool) -> None:
    pytest.importorskip("triton")
    params, dims = METHOD.params(), Dims(seq_len=1301, num_layers=2, batch_size=2, causal=causal)
    counted = trace(METHOD, dims, params, "triton", mode, "fp32")
    cost = METHOD.cost_of("triton", mode, causal, "none", params)
    values = bindings(dims, params, 4, METHOD.segment_len(params))
    assert evaluate(total(cost.flops), values) == counted.flops
    assert evaluate(cost.peak_bytes, values) == counted.peak_bytes
    assert not counted.uncounted


LINES = [None, Line(), Line(base=1), Line(base=-3), Line(stride=0, base=4), Line(4, 4), Line(3, 2, 2, -1), Line(4)]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (5, 12), (23, 11), (0, 3), (4, 0)])
@pytest.mark.parametrize("offset", [0, 1, 9])
def test_visible_pairs_are_counted_one_by_one(queries: int, keys: int, offset: int) -> None:
    for low, high in itertools.product(LINES, LINES):
        seen = sum(
            (low is None or key >= low.at(row + offset)) and (high is None or key < high.at(row + offset))
            for row in range(queries)
            for key in range(keys)
        )
        assert visible_pairs(queries, keys, low, high, offset) == seen, (low, high)


def test_lines_that_would_turn_back_are_refused() -> None:
    for line in (Line(step=0), Line(stride=-1)):
        with pytest.raises(ValueError, match="step at least 1 and stride at least 0"):
            visible_pairs(3, 3, line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -1}, "offset must be at least 0, received -1"),
        ({"ranges": 0}, "1 to 3 ranges, received 0"),
        ({"ranges": 4}, "1 to 3 ranges, received 4"),
        ({"heads": 4}, "heads of q be a multiple of theirs"),
        ({"dtype": torch.float64}, "all fp32, fp16 or bf16"),
        ({"width": 512}, "at most"),
    ],
)
def test_what_kernels_cannot_take_is_refused(change: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else tensors of the CPU are for other kernels
    from ctxbench.implementations._shared.ranges import Range, attend

    case = {"offset": 0, "ranges": 1, "heads": 3, "dtype": torch.float32, "width": 8} | change
    q, k = (torch.zeros(1, heads, 4, case["width"], dtype=case["dtype"]) for heads in (6, case["heads"]))
    with pytest.raises(ValueError, match=message):
        attend(q, [Range(k, k)] * case["ranges"], offset=case["offset"])


@pytest.mark.parametrize(
    ("width", "device", "dtype", "reason"),
    [
        (64, "cpu", "bf16", "runs on cuda"),
        (64, "cuda", "fp64", "compute in fp32, bf16, fp16"),
        (264, "cuda", "bf16", "at most 256 channels, received 264"),
        (264, "cuda", "fp32", "at most 256 channels, received 264"),
        (256, "cuda", "bf16", ""),
        (256, "cuda", "fp32", ""),
    ],
)
def test_support_says_why_not(monkeypatch, width: int, device: str, dtype: str, reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    dims = Dims(seq_len=64, d_model=2 * width, num_heads=2)
    answer = METHOD.impl_support(METHOD.impl("triton"), "forward", dims, METHOD.params(), device, dtype)
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
