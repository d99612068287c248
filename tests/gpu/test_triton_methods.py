"""Methods' seams for Triton: against their references in the interpreter, and formulas against the tracer's counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations import bigbird, dense, longformer, longlora
from ctxbench.method import Dims

CASES = {"longlora": 7, "longformer": 8, "bigbird": 7}


@pytest.mark.parametrize("method", CASES)
def test_layers_agree_with_their_references_in_the_interpreter(program, wrong, method) -> None:
    rows = program("methods_parity.py", method, interpret=True)
    assert len(rows) == CASES[method]
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_layers_agree_with_their_references_on_the_device(program, wrong) -> None:
    rows = program("methods_parity.py", interpret=False)
    assert len(rows) == 2 * sum(CASES.values())
    assert not wrong(rows)


FORMS: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [  # method, parameters, dims
    (dense.METHOD, {}, {"position": "t5"}),
    (dense.METHOD, {}, {"position": "alibi", "causal": False}),
    (dense.METHOD, {}, {"position": "rope"}),
    (longlora.METHOD, {}, {}),
    (longlora.METHOD, {"group": 64, "wrap": True}, {"causal": False, "seq_len": 301}),
    (longlora.METHOD, {}, {"position": "t5"}),
    (longlora.METHOD, {"group": 64, "wrap": True}, {"causal": False, "seq_len": 301, "position": "t5"}),
    (longlora.METHOD, {"group": 2048}, {"position": "alibi"}),
    (longlora.METHOD, {"group": 2048}, {"num_heads": 1, "d_model": 32}),
    (longformer.METHOD, {"window": 100}, {}),
    (longformer.METHOD, {"window": 101}, {"causal": False}),
    (longformer.METHOD, {"window": 40, "num_global": 5, "scattered": "3+70+300+1200", "separate_global": False}, {}),
    (longformer.METHOD, {"window": 40, "num_global": 5, "scattered": "70+300"}, {"causal": False}),
    (longformer.METHOD, {"window": 40, "dilation": 3, "dilated_heads": 1, "scattered": "70+300"}, {}),
    (longformer.METHOD, {"window": 50, "num_global": 0, "dilation": 2}, {"position": "t5"}),
    (longformer.METHOD, {"window": 100}, {"position": "rope"}),
    (longformer.METHOD, {"window": 100}, {"position": "rope", "causal": False, "d_ff": 0}),
    (longlora.METHOD, {}, {"position": "rope", "d_ff": 0}),
    (bigbird.METHOD, {}, {"causal": False, "position": "rope"}),
    (bigbird.METHOD, {"block_size": 700}, {"causal": False, "position": "rope", "d_ff": 0}),
    (bigbird.METHOD, {}, {"causal": False}),
    (bigbird.METHOD, {"block_size": 500}, {"causal": False, "position": "alibi"}),
    (bigbird.METHOD, {"block_size": 50}, {"causal": False, "position": "t5"}),
    (bigbird.METHOD, {"block_size": 700}, {"causal": False, "position": "t5", "d_ff": 0, "batch_size": 1}),
    (bigbird.METHOD, {"block_size": 64}, {"causal": False, "position": "t5", "seq_len": 60, "num_layers": 1}),
    (bigbird.METHOD, {"block_size": 16}, {"causal": False, "position": "alibi", "seq_len": 333, "num_layers": 3}),
    (bigbird.METHOD, {"block_size": 16}, {"causal": False, "position": "t5", "seq_len": 333, "num_layers": 3}),
    (bigbird.METHOD, {"plan": "official"}, {"causal": False, "seq_len": 2048}),
    (bigbird.METHOD, {"form": "etc"}, {"causal": False}),
]


@pytest.mark.parametrize(
    ("method", "params", "dims"), FORMS, ids=lambda value: getattr(value, "name", None) or "-".join(map(str, value))
)
@pytest.mark.usefixtures("for_triton")
def test_formulas_are_what_the_tracer_counts(method, params, dims) -> None:
    pytest.importorskip("triton")
    params, dims = method.params(**params), Dims(1301, 2, 64, 4, 2, 64).replace(**dims)
    assert method.mode_support("forward", dims, params)
    for mode in method.modes:
        if mode in ("stream", "decode") and not dims.causal:
            continue
        counted = trace(method, dims, params, "triton", mode, "fp32")
        cost = method.cost_of("triton", mode, dims.causal, dims.position, params)
        values = bindings(dims, params, 4, method.segment_len(params))
        assert evaluate(total(cost.flops), values) == counted.flops, mode
        assert not counted.uncounted
        if cost.peak_bytes is not None:
            assert evaluate(cost.peak_bytes, values) == counted.peak_bytes, mode
