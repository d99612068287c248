"""Longformer's closed forms: pairs against brute force and against the plan, FLOPs, state and peaks as counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import window_blocks as blocked
from ctxbench.implementations._shared.window import Pattern
from ctxbench.implementations.longformer import METHOD
from ctxbench.implementations.longformer.cost import Form
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.method import Dims

directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (Pattern(256, 256, 1, 0, False), 2_035_456),
        (Pattern(256, 256, 1, 1, False), 2_043_134),
        (Pattern(256, 256, 1, 64, False), 2_522_816),
        (Pattern(511, 0, 1, 0, True), 1_966_336),
        (Pattern(511, 0, 1, 16, True), 2_023_560),
        (Pattern(64, 64, 4, 0, False), 511_744),
    ],
    ids=["band", "one_global", "prefix_64", "causal", "causal_prefix_16", "dilated"],
)
def test_golden_pair_counts_at_4096(pattern, pairs):
    window = pattern.left + 1 if pattern.causal else 2 * pattern.left
    params = LongformerParams(window=window, num_global=pattern.num_global, dilation=pattern.dilation)
    assert params.pattern(pattern.causal) == pattern
    assert evaluate(Form(pattern.causal, params).visible(), bindings(Dims(seq_len=4096), params, 4, 512)) == pairs


@given(
    st.integers(1, 40), st.integers(1, 50), st.integers(0, 12), st.integers(1, 4), st.booleans(),
    st.lists(st.integers(0, 45), max_size=5),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_visible_pairs_equal_brute_force(length, window, num_global, dilation, causal, scattered):
    params = LongformerParams(
        window=window, num_global=num_global, dilation=dilation, scattered="+".join(map(str, scattered))
    )
    pattern, counted = params.pattern(causal), 0
    everywhere = {*range(num_global), *scattered}
    for i in range(length):
        for j in range(length):
            near = (i - j) % dilation == 0 and -pattern.right <= (i - j) // dilation <= pattern.left
            seen = near or i in everywhere or j in everywhere
            counted += seen and not (causal and j > i)
            assert (j in pattern.sees(i, length)) == (seen and not (causal and j > i))
    values = bindings(Dims(seq_len=length), params, 4, 512)
    form = Form(causal, params)
    assert evaluate(form.visible(), values) == counted
    if causal:
        assert evaluate(form.visible_to_one(), values) == len(pattern.sees(length, length + 1))


@given(
    st.integers(1, 3000), st.integers(1, 700), st.integers(0, 300), st.integers(1, 3), st.booleans()
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_executed_pairs_equal_the_plan(length, window, num_global, dilation, causal):
    params = LongformerParams(window=window, num_global=num_global, dilation=dilation)
    prefix = min(num_global, length)
    blocks = [block for span in blocked.plan(length, length, prefix, params.pattern(causal)) for block in span.blocks]
    assert sum(block.rows for block in blocks) == length - prefix
    planned = sum(block.rows * (num_global + block.run) for block in blocks)
    planned += prefix * (prefix + 1) // 2 if causal else prefix * length
    values = bindings(Dims(seq_len=length), params, 4, 512)
    assert evaluate(Form(causal, params).executed("blocked"), values) == planned


@pytest.mark.parametrize(
    ("impl", "mode", "lengths"),
    [
        ("reference", "forward", (1, 131)),
        ("reference", "train", (67,)),
        ("reference", "stream", (131, 1100)),
        ("reference", "decode", (1, 131)),
        ("blocked", "forward", (1, 131, 389)),
        ("blocked", "train", (131,)),
        ("blocked", "stream", (1100,)),
        ("blocked", "decode", (1, 131)),
    ],
)
@pytest.mark.parametrize(
    "params",
    [
        LongformerParams(window=130, num_global=5, dilation=3),
        LongformerParams(window=33, num_global=200),
        LongformerParams(window=33, num_global=2, scattered="64+100+101+600"),
        LongformerParams(window=9, num_global=0, scattered="64+70", dilation=3, dilated_heads=1, separate_global=False),
    ],
    ids=["dilated", "long_prefix", "scattered", "mixed_heads"],
)
def test_formulas_equal_the_counts_where_blocks_and_classes_are_ragged(impl, mode, lengths, params):
    for causal in (True, False) if mode in ("forward", "train") else (True,):
        cost = METHOD.cost_of(impl, mode, causal, "none", params)
        for length in lengths:
            dims = Dims(seq_len=length, batch_size=2, causal=causal, d_model=16, num_heads=2, d_ff=24)
            counted, values = trace(METHOD, dims, params, impl, mode), bindings(dims, params, 4, 512)
            assert evaluate(total(cost.flops), values) == counted.flops
            assert evaluate(cost.num_parameters, values) == counted.num_parameters
            if counted.state_bytes is not None:
                assert evaluate(cost.state_bytes, values) == counted.state_bytes


@pytest.mark.parametrize(
    ("mode", "causal"),
    [("forward", True), ("forward", False), ("train", True), ("train", False), ("stream", True), ("decode", True)],
)
@impls
def test_peak_formulas_hold_with_several_layers_batches_and_bf16(impl, mode, causal):
    params = LongformerParams(window=256, num_global=100)
    dims = Dims(seq_len=2300, batch_size=2, num_layers=2, causal=causal, d_model=128, d_ff=256)
    formula = METHOD.cost_of(impl, mode, causal, "none", params).peak_bytes
    found = trace(METHOD, dims, params, impl, mode, "bf16").peak_bytes
    assert evaluate(formula, bindings(dims, params, 2, METHOD.segment_len(params))) == pytest.approx(found, rel=0.03)


@directions
@pytest.mark.parametrize(("impl", "mode"), [("reference", "forward"), ("blocked", "forward"), ("blocked", "train")])
def test_peak_formulas_hold_with_scattered_globals(impl, mode, causal):
    params = LongformerParams(window=128, num_global=3, scattered="100+700+1500+9000")
    dims = Dims(seq_len=2100, batch_size=2, num_layers=2, causal=causal, d_model=64, num_heads=2, d_ff=0)
    for chosen in (params, params.replace(scattered="100+700+1500")):
        formula = METHOD.cost_of(impl, mode, causal, "none", chosen).peak_bytes
        found = trace(METHOD, dims, chosen, impl, mode).peak_bytes
        assert evaluate(formula, bindings(dims, chosen, 4, 512)) == pytest.approx(found, rel=0.03)


@directions
@pytest.mark.parametrize(("mode", "longest"), [("forward", 8192), ("train", 3072)])
def test_blocked_memory_grows_linearly(mode, longest, causal):
    params = METHOD.params()
    peaks = [
        trace(METHOD, Dims(seq_len=length, causal=causal, d_ff=0), params, "blocked", mode).peak_bytes
        for length in (1024, longest)
    ]
    assert np.log(peaks[1] / peaks[0]) / np.log(longest / 1024) < 1.1


def test_stream_memory_does_not_grow_with_the_length():
    params = LongformerParams(window=64, num_global=4)
    peaks = {trace(METHOD, Dims(seq_len=n), params, "blocked", "stream").peak_bytes for n in (1536, 3072)}
    assert len(peaks) == 1


def test_the_sketch_needs_quadratic_memory_and_dense_flops():
    dims, params = Dims(seq_len=256, d_model=16, d_ff=0), LongformerParams(window=64, num_global=1)
    small, large = (trace(METHOD, dims.replace(seq_len=n), params, "as_written") for n in (256, 512))
    assert large.peak_bytes / small.peak_bytes > 3.7
    assert small.flops == 8 * 256 * 16**2 + 4 * 256**2 * 16
