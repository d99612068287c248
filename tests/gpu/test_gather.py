"""The kernels that select and gather: against float64, and by their formulas."""

from __future__ import annotations

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.method import DTYPE_BYTES, Dims, Method
from ctxbench.registry import discover

METHODS = {method.name: method for method in discover()}
FORMS = [
    ("routing", {}),
    ("routing", {"exclude_self": True, "num_clusters": 7}),
    ("routing", {"selection": "topw"}),
    ("routing", {"selection": "topw", "masked": True, "exclude_self": True, "cluster_size": 50}),
    ("memorizing", {"memory_len": 700, "segment_len": 200, "window": 100, "top_k": 16}),
    ("memorizing", {"memory_len": 700, "segment_len": 200, "window": 100, "lookup": "dense"}),
    ("memorizing", {"memory_len": 100, "segment_len": 200, "window": 100, "top_k": 200}),
    ("memory_bank", {"num_slots": 100, "segment_len": 200}),
    ("memory_bank", {"num_slots": 100, "segment_len": 200, "write": "argmax"}),
    ("compressive_memory", {"segment_len": 256, "recent_len": 256, "compressed_len": 128, "item_len": 32}),
]


def test_kernels_agree_with_float64_in_the_interpreter(program, wrong) -> None:
    rows = program("gather_parity.py", interpret=True)
    assert len(rows) == 40
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_kernels_agree_with_float64_on_the_device(program, wrong) -> None:
    rows = program("gather_parity.py", interpret=False)
    assert {row[1] for row in rows} == {"bf16", "fp16", "fp32"}
    assert not wrong(rows)


@pytest.mark.parametrize(("name", "changes"), FORMS, ids=str)
@pytest.mark.usefixtures("for_triton")
def test_formulas_are_what_the_tracer_counts(name: str, changes: dict) -> None:
    pytest.importorskip("triton")
    method: Method = METHODS[name]
    params, compared = method.params(**changes), 0
    for mode in ("forward", "train", "stream"):
        causal = getattr(params, "selection", "strict") == "strict"
        for position in [name for name in ("none", "t5", "alibi") if name in method.positions]:
            dims = Dims(seq_len=1301, num_layers=2, batch_size=2, causal=causal, position=position)
            answer = method.impl_support(method.impl("triton"), mode, dims, params, "cuda", "fp32")
            if not (method.mode_support(mode, dims, params) and answer):
                continue
            counted = trace(method, dims, params, "triton", mode, "fp32")
            cost = method.cost_of("triton", mode, causal, position, params)
            values = bindings(dims, params, 4, method.segment_len(params))
            assert evaluate(total(cost.flops), values) == counted.flops
            assert not counted.uncounted
            if cost.peak_bytes is not None:
                assert evaluate(cost.peak_bytes, values) == counted.peak_bytes, mode
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize(("length", "layers", "d_ff", "dtype"), [(203, 2, 96, "fp32"), (600, 3, 0, "bf16")])
@pytest.mark.parametrize("changes", [{"local_block": 100}, {"local_share": 0.0}, {"local_share": 0.75}], ids=str)
@pytest.mark.usefixtures("for_triton")
def test_peaks_of_clusters_are_the_tracers(changes: dict, length: int, layers: int, d_ff: int, dtype: str) -> None:
    for mode in METHODS["routing"].modes:
        assert peaks("routing", mode, changes, Dims(length, 2, 64, 4, layers, d_ff), dtype) == 0, mode


@pytest.mark.parametrize(
    ("length", "batch", "layers", "d_ff", "dtype"),
    [(1, 1, 3, 0, "bf16"), (203, 2, 2, 96, "fp32"), (777, 1, 6, 0, "bf16"), (600, 2, 6, 256, "fp32")],
)
@pytest.mark.parametrize("changes", [{}, {"memory_len": 0, "window": 7}, {"lookup": "dense", "window": 900}], ids=str)
def test_peaks_of_lookups_are_the_tracers(
    changes: dict, length: int, batch: int, layers: int, d_ff: int, dtype: str
) -> None:
    assert peaks("memorizing", "forward", changes, Dims(length, batch, 64, 4, layers, d_ff), dtype) == 0


def peaks(name: str, mode: str, changes: dict, dims: Dims, dtype: str) -> int:
    """How far the formula is from the trace, in bytes."""
    pytest.importorskip("triton")
    method = METHODS[name]
    params = method.params(**changes)
    values = bindings(dims, params, DTYPE_BYTES[dtype], method.segment_len(params))
    formula = evaluate(method.cost_of("triton", mode, True, "none", params).peak_bytes, values)
    return int(formula) - trace(method, dims, params, "triton", mode, dtype).peak_bytes


@pytest.mark.parametrize(
    ("name", "changes", "dims", "reason"),
    [
        ("routing", {"num_clusters": 5000}, {}, "at most 4096 clusters"),
        ("routing", {}, {"d_model": 264}, "gathering kernels hold heads of at most 128 channels"),
        ("routing", {}, {"position": "t5"}, "t5: these kernels hide by the ranks"),
        ("routing", {}, {"dtype": "fp32"}, ""),
        ("routing", {}, {"d_model": 264, "dtype": "fp32"}, "in fp32 the gathering kernels hold heads of at most 128"),
        ("memorizing", {}, {"dtype": "fp32"}, ""),
        ("memorizing", {}, {"d_model": 512}, "search kernels hold heads of at most 128 channels"),
        ("memorizing", {"lookup": "dense"}, {"d_model": 512}, ""),
        ("memorizing", {"top_k": 200}, {}, "at most 128 pairs a query"),
        ("memorizing", {}, {"position": "t5"}, ""),
        ("memorizing", {"top_k": 9000}, {}, ""),
        ("memory_bank", {"segment_len": 1}, {"seq_len": 40000}, "at most 65535 heads"),
        ("compressive_memory", {}, {"position": "rope"}, ""),
    ],
)
def test_support_says_why_not(monkeypatch, name: str, changes: dict, dims: dict, reason: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    method, sizes = METHODS[name], {"seq_len": 64, "d_model": 256, "num_heads": 2, "dtype": "bf16"} | dims
    dtype = sizes.pop("dtype")
    answer = method.impl_support(
        method.impl("triton"), "forward", Dims(**sizes), method.params(**changes), "cuda", dtype
    )  # fmt: skip
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
