"""Longformer: parity with the package transformers, pair counts, edges of the window, and what the sketch costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.longformer import METHOD, blocked, reference
from ctxbench.implementations.longformer.cost import Form
from ctxbench.implementations.longformer.layer import GlobalRows
from ctxbench.implementations.longformer.params import LongformerParams, Pattern
from ctxbench.method import Dims

GOLDEN = Path(__file__).parents[1] / "golden" / "longformer.npz"
FORMS = {
    "window": LongformerParams(window=9, num_global=0),
    "even": LongformerParams(window=8, num_global=3),
    "shared": LongformerParams(window=8, num_global=3, separate_global=False),
    "dilated": LongformerParams(window=5, num_global=2, dilation=3),
    "wide": LongformerParams(window=400, num_global=3),
    "long_prefix": LongformerParams(window=4, num_global=150),
    "single": LongformerParams(window=1, num_global=1),
}
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


@impls
@pytest.mark.parametrize(("name", "num_global"), [("no_globals", 0), ("one_global", 1), ("three_globals", 3)])
def test_outputs_and_gradients_equal_those_of_transformers(impl, name, num_global):
    golden = {
        key.removeprefix(f"{name}/"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(f"{name}/")
    }
    x = golden["x"].clone().requires_grad_()
    dims = Dims(seq_len=x.shape[1], d_model=x.shape[2], num_heads=2, d_ff=0, causal=False)
    stack = METHOD.make(dims, LongformerParams(window=8, num_global=num_global), impl, "cpu", torch.float64)
    mixer = stack.layers[0].mixer
    mixer.o = torch.nn.Identity()  # the package's output projection is in another module
    weights = {key: value for key, value in golden.items() if key in mixer.state_dict()}
    assert len(weights) == (12 if num_global else 6)
    mixer.load_state_dict(weights)
    y = mixer(x).y
    y.backward(golden["grad"])
    torch.testing.assert_close(y, golden["y"], rtol=0, atol=2e-6)  # its softmax is float32
    torch.testing.assert_close(x.grad, golden["grad.x"], rtol=0, atol=5e-6)
    for key, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grad.{key}"], rtol=0, atol=2e-5)


def run(impl: str, params: LongformerParams, causal: bool, length: int) -> dict[str, torch.Tensor]:
    """Output and all gradients of a layer in float64, weights and input from fixed seeds."""
    torch.manual_seed(0)
    dims = Dims(seq_len=length, d_model=8, num_heads=2, d_ff=0, causal=causal)
    module = METHOD.make(dims, params, impl, "cpu", torch.float64)
    torch.manual_seed(length)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    y = module(x).y
    y.backward(torch.randn_like(y))
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


@forms
@directions
@pytest.mark.parametrize("length", [1, 2, 5, 63, 67, 131])
def test_blocked_equals_reference_in_outputs_and_gradients(params, causal, length):
    expected, found = run("reference", params, causal, length), run("blocked", params, causal, length)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@directions
def test_blocked_equals_reference_over_several_spans(causal):
    params, length = LongformerParams(window=150, num_global=140), 1024 + 128 + 140 + 3
    expected, found = run("reference", params, causal, length), run("blocked", params, causal, length)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@impls
@forms
@pytest.mark.parametrize("sizes", [[1] * 40, [7, 1, 2, 30], [160, 1, 39, 100], [300]], ids=str)
def test_streaming_equals_the_whole_sequence(impl, params, sizes):
    torch.manual_seed(0)
    module = METHOD.make(Dims(seq_len=sum(sizes), d_model=8, num_heads=2), params, impl, "cpu", torch.float64)
    x = torch.randn(2, sum(sizes), 8, dtype=torch.float64)
    with torch.no_grad():
        state, pieces, seen = module.init_state(2), [], 0
        for chunk in x.split(sizes, dim=1):
            y, state = module(chunk, state)
            pieces.append(y)
            seen += chunk.shape[1]
            assert [t.shape for t in state[0]] == [t.shape for t in module.state_at(2, seen)[0]]
        torch.testing.assert_close(torch.cat(pieces, dim=1), module(x).y, rtol=1e-10, atol=1e-11)


def test_the_state_does_not_grow_beyond_prefix_and_window():
    module = METHOD.make(Dims(seq_len=1), LongformerParams(window=512, num_global=16), "blocked", "cpu", torch.float32)
    assert {state.k.shape[2] for state in module.state_at(1, 527) + module.state_at(1, 131072)} == {16 + 511}


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
    st.integers(1, 40), st.integers(1, 50), st.integers(0, 12), st.integers(1, 4), st.booleans()
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_visible_pairs_equal_brute_force(length, window, num_global, dilation, causal):
    params = LongformerParams(window=window, num_global=num_global, dilation=dilation)
    pattern, counted = params.pattern(causal), 0
    for i in range(length):
        for j in range(length):
            near = (i - j) % dilation == 0 and -pattern.right <= (i - j) // dilation <= pattern.left
            seen = near or i < num_global or j < num_global
            counted += seen and not (causal and j > i)
            assert (j in pattern.sees(i, length)) == (seen and not (causal and j > i))
    values = bindings(Dims(seq_len=length), params, 4, 512)
    assert evaluate(Form(causal, params).visible(), values) == counted


@given(
    st.integers(1, 3000), st.integers(1, 700), st.integers(0, 300), st.integers(1, 3), st.booleans()
)  # fmt: skip
@settings(max_examples=40, deadline=None)
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
        ("reference", "forward", (1, 131, 641)),
        ("reference", "train", (131,)),
        ("reference", "stream", (131, 1301)),
        ("reference", "decode", (1, 131, 641)),
        ("blocked", "forward", (1, 131, 641)),
        ("blocked", "train", (131, 389)),
        ("blocked", "stream", (131, 1301)),
        ("blocked", "decode", (1, 131, 641)),
    ],
)
@pytest.mark.parametrize(
    "params",
    [LongformerParams(window=130, num_global=5, dilation=3), LongformerParams(window=33, num_global=200)],
    ids=["dilated", "long_prefix"],
)
def test_formulas_equal_the_counts_where_blocks_and_classes_are_ragged(impl, mode, lengths, params):
    for length in lengths:
        for causal in (True, False) if mode in ("forward", "train") else (True,):
            dims = Dims(seq_len=length, batch_size=2, causal=causal, d_model=16, num_heads=2, d_ff=24)
            counted, cost = trace(METHOD, dims, params, impl, mode), METHOD.cost_of(impl, mode, causal, "none", params)
            values = bindings(dims, params, 4, METHOD.segment_len(params))
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
    dims = Dims(seq_len=4500, batch_size=2, num_layers=2, causal=causal, d_model=128, d_ff=256)
    formula = METHOD.cost_of(impl, mode, causal, "none", params).peak_bytes
    found = trace(METHOD, dims, params, impl, mode, "bf16").peak_bytes
    assert evaluate(formula, bindings(dims, params, 2, METHOD.segment_len(params))) == pytest.approx(found, rel=0.03)


@directions
@pytest.mark.parametrize(("mode", "longest"), [("forward", 16384), ("train", 4096)])
def test_blocked_memory_grows_linearly(mode, longest, causal):
    params = METHOD.params()
    peaks = [
        trace(METHOD, Dims(seq_len=length, causal=causal, d_ff=0), params, "blocked", mode).peak_bytes
        for length in (2048, longest)
    ]
    assert np.log(peaks[1] / peaks[0]) / np.log(longest / 2048) < 1.1


def test_stream_memory_does_not_grow_with_the_length():
    params = LongformerParams(window=64, num_global=4)
    peaks = {trace(METHOD, Dims(seq_len=n), params, "blocked", "stream").peak_bytes for n in (1536, 3072)}
    assert len(peaks) == 1


def test_the_sketch_needs_quadratic_memory_and_dense_flops():
    dims, params = Dims(seq_len=256, d_model=16, d_ff=0), LongformerParams(window=64, num_global=1)
    small, large = (trace(METHOD, dims.replace(seq_len=n), params, "as_written") for n in (256, 512))
    assert large.peak_bytes / small.peak_bytes > 3.7
    assert small.flops == 8 * 256 * 16**2 + 4 * 256**2 * 16


@pytest.mark.parametrize(("window", "keys"), [(512, 513), (7, 7), (8, 9)])
def test_the_sketch_sees_one_key_more_than_an_even_window_says(window, keys):
    length = 4 * window
    dims = Dims(seq_len=length, d_model=8, num_heads=2, d_ff=0)
    module = METHOD.make(dims, LongformerParams(window=window, num_global=0), "as_written", "cpu", torch.float64)
    mask = module.layers[0].mixer.mask(length)
    assert int(mask[length // 2].sum()) == keys
    assert LongformerParams(window=window).pattern(False).left * 2 + 1 == keys
    assert LongformerParams(window=window).pattern(True).left + 1 == window


def test_without_separate_projections_the_sketch_is_right_where_it_is_bidirectional():
    params, dims = LongformerParams(window=8, num_global=2, separate_global=False), Dims(seq_len=29, causal=False)
    outputs = []
    for impl in ("reference", "as_written"):
        torch.manual_seed(0)
        module = METHOD.make(dims, params, impl, "cpu", torch.float64)
        torch.manual_seed(1)
        outputs.append(module(torch.randn(1, 29, 256, dtype=torch.float64)).y)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-11)


def test_global_rows_of_a_causal_layer_see_only_themselves_and_earlier_tokens():
    pattern = LongformerParams(window=2, num_global=3).pattern(causal=True)
    assert [pattern.sees(i, 8) for i in (0, 2, 3, 7)] == [{0}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 6, 7}]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_gradients_are_exact_by_finite_differences(causal):
    pattern = LongformerParams(window=4, num_global=2, dilation=2).pattern(causal)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        seen = 2 if causal else 11
        return blocked.attend(q, k, v, GlobalRows(q[:, :, :2], k[:, :, :seen], v[:, :, :seen]), pattern)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


def test_half_precision_is_no_worse_than_the_reference():
    pattern = LongformerParams(window=64, num_global=4).pattern(causal=True)
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, 300, 16, dtype=torch.float64) for _ in range(3)]
    q, k, v = (a.bfloat16() for a in exact)
    rows = GlobalRows(q[:, :, :4], k[:, :, :4], v[:, :, :4])
    double = GlobalRows(*(a.double() for a in rows))
    truth = reference.attend(q.double(), k.double(), v.double(), double, pattern)
    own = (reference.attend(q, k, v, rows, pattern).double() - truth).abs().max()
    assert (blocked.attend(q, k, v, rows, pattern).double() - truth).abs().max() <= 2 * own


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "window must be at least 1, received 0"),
        ({"num_global": -1}, "num_global must be at least 0, received -1"),
        ({"dilation": 0}, "dilation must be at least 1, received 0"),
        ({"separate_global": 1}, "separate_global must be of type bool, received 1"),
    ],
    ids=["window", "num_global", "dilation", "separate_global"],
)
def test_parameters_outside_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LongformerParams(**values)


@pytest.mark.parametrize("mode", ["stream", "decode"])
def test_a_bidirectional_layer_says_why_it_cannot_be_continued(mode):
    answer = METHOD.mode_support(mode, Dims(seq_len=8, causal=False), METHOD.params())
    assert not answer
    assert "cannot be continued" in answer.reason
