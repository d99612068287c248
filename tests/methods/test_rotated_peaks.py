"""Formulas of peaks where queries and keys are rotated, against the tracer, at lengths that no block divides."""

from __future__ import annotations

import pytest

from ctxbench.cost import evaluate
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations import bigbird, hierarchical, longformer, longlora, melodi, memory_bank, pyramid, rmt
from ctxbench.method import DTYPE_BYTES, Dims

CASES = [
    (method, impl, mode, causal)
    for method, modes in (
        (bigbird.METHOD, ("forward", "train")),
        (longlora.METHOD, ("forward", "train")),
        (longformer.METHOD, ("forward", "train", "decode")),
        (melodi.METHOD, ("forward", "stream", "decode")),
    )
    for impl in ("reference", "blocked")
    for mode in modes
    for causal in method.causal
    if causal or mode in ("forward", "train")
]
SIZES = [
    (1101, "fp32", {}),
    (1999, "fp32", {"num_layers": 3, "batch_size": 1}),
    (2333, "fp32", {"d_ff": 0, "position": "rope_yarn"}),
    (4133, "bf16", {"batch_size": 1, "d_ff": 512}),
]


@pytest.mark.parametrize(("length", "dtype", "changes"), SIZES, ids=lambda value: str(value))
@pytest.mark.parametrize(("method", "impl", "mode", "causal"), CASES, ids=lambda value: getattr(value, "name", value))
def test_peak_is_within_three_percent_of_the_trace(method, impl, mode, causal, length, dtype, changes) -> None:
    params = method.params()
    dims = Dims(length, 2, 128, 4, 2, 256, causal=causal, position="rope").replace(**changes)
    values = bindings(dims, params, DTYPE_BYTES[dtype], method.segment_len(params))
    formula = evaluate(method.cost_of(impl, mode, causal, dims.position, params).peak_bytes, values)
    assert trace(method, dims, params, impl, mode, dtype).peak_bytes == pytest.approx(formula, rel=0.03)


@pytest.mark.parametrize("length", [1101, 4133])
@pytest.mark.parametrize(
    ("method", "impl", "mode"),
    [
        (method, impl, mode)
        for method in (memory_bank.METHOD, pyramid.METHOD, rmt.METHOD)
        for impl, modes in (("native", ("forward", "stream")), ("blocked", ("stream", "decode")))
        for mode in modes
    ]
    + [(hierarchical.METHOD, impl, mode) for impl in ("native", "blocked") for mode in ("forward", "train")],
    ids=lambda value: getattr(value, "name", value),
)
def test_rotations_are_a_moment_of_their_own_in_pieces_and_levels(method, impl, mode, length) -> None:
    """Without a network to outweigh them, over as little memory as there may be."""
    params = method.params(num_slots=8) if method is memory_bank.METHOD else method.params()
    dims = Dims(length, 2, 128, 4, 4, 0, causal=True, position="rope")
    values = bindings(dims, params, 4, method.segment_len(params))
    formula = evaluate(method.cost_of(impl, mode, True, "rope", params).peak_bytes, values)
    assert formula == pytest.approx(trace(method, dims, params, impl, mode).peak_bytes, rel=0.01)
