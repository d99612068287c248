"""Peaks of methods that loop over segments, formula against tracer: several layers and rows, a segment that is open."""

from __future__ import annotations

import pytest

from ctxbench.cost import evaluate
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations import block_recurrent, melodi
from ctxbench.method import DTYPE_BYTES, Dims

SIZES = [
    (1999, {"num_layers": 4, "d_ff": 0, "batch_size": 1}),  # no network hides what attention holds
    (3333, {"num_layers": 3, "d_model": 96, "num_heads": 3}),
]
CASES = [
    *((melodi.METHOD, "native", mode, position) for mode in ("forward", "stream") for position in ("none", "t5")),
    (melodi.METHOD, "native", "forward", "rope"),
    (melodi.METHOD, "native", "train", "none"),
    (melodi.METHOD, "blocked", "stream", "none"),
    *(
        (block_recurrent.METHOD, "native", mode, position)
        for mode in ("forward", "stream")
        for position in ("none", "t5")
    ),
    *((block_recurrent.METHOD, impl, "train", "none") for impl in ("blocked", "slabs", "triton")),
    (block_recurrent.METHOD, "triton", "decode", "none"),
]


@pytest.mark.parametrize(("length", "changes"), SIZES, ids=lambda value: str(value))
@pytest.mark.parametrize(("method", "impl", "mode", "position"), CASES, ids=lambda value: getattr(value, "name", value))
def test_peak_is_within_three_percent_of_the_trace(method, impl, mode, position, length, changes) -> None:
    params, dtype = method.params(), "bf16" if impl == "slabs" else "fp32"
    dims = Dims(length, 2, 128, 4, 2, 512, position=position).replace(**changes)
    values = bindings(dims, params, DTYPE_BYTES[dtype], method.segment_len(params))
    formula = evaluate(method.cost_of(impl, mode, True, position, params).peak_bytes, values)
    assert trace(method, dims, params, impl, mode, dtype).peak_bytes == pytest.approx(formula, rel=0.03)
