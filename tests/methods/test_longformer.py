"""Longformer: parity with the package transformers, agreement of impls, streaming, edges of the window, the sketch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import window_blocks as blocked
from ctxbench.implementations._shared.window import GlobalRows, Scattered
from ctxbench.implementations.longformer import METHOD, reference
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.method import Dims
from ctxbench.testing.behaviour import layout

GOLDEN = Path(__file__).parents[1] / "golden" / "longformer.npz"
FORMS = {
    "window": LongformerParams(window=9, num_global=0),
    "even": LongformerParams(window=8, num_global=3),
    "shared": LongformerParams(window=8, num_global=3, separate_global=False),
    "dilated": LongformerParams(window=5, num_global=2, dilation=3),
    "wide": LongformerParams(window=400, num_global=3),
    "long_prefix": LongformerParams(window=4, num_global=150),
    "single": LongformerParams(window=1, num_global=1),
    "scattered": LongformerParams(window=9, num_global=0, scattered="4+5+40+64+300"),
    "scattered_shared": LongformerParams(window=8, num_global=2, scattered="40+1+66", separate_global=False),
    "mixed_heads": LongformerParams(window=5, num_global=1, scattered="62+67", dilation=3, dilated_heads=1),
}
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


@impls
@pytest.mark.parametrize(
    ("name", "num_global", "scattered"),
    [("no_globals", 0, ""), ("one_global", 1, ""), ("three_globals", 3, ""), ("scattered", 0, "0+5+6+17")],
)
def test_outputs_and_gradients_equal_those_of_transformers(impl, name, num_global, scattered):
    golden = {
        key.removeprefix(f"{name}/"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(f"{name}/")
    }
    x = golden["x"].clone().requires_grad_()
    dims = Dims(seq_len=x.shape[1], d_model=x.shape[2], num_heads=2, d_ff=0, causal=False)
    params = LongformerParams(window=8, num_global=num_global, scattered=scattered)
    stack = METHOD.make(dims, params, impl, "cpu", torch.float64)
    mixer = stack.layers[0].mixer
    mixer.o = torch.nn.Identity()  # the package's output projection is in another module
    weights = {key: value for key, value in golden.items() if key in mixer.state_dict()}
    assert len(weights) == (6 if name == "no_globals" else 12)
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


@directions
@pytest.mark.parametrize("name", ["scattered", "scattered_shared", "mixed_heads"])
def test_reference_equals_a_loop_over_pairs(name, causal):
    params, length = FORMS[name], 45
    torch.manual_seed(0)
    dims = Dims(seq_len=length, d_model=8, num_heads=2, d_ff=0, causal=causal)
    (layer,) = METHOD.make(dims, params, "reference", "cpu", torch.float64).layers
    x, mixer = torch.randn(1, length, 8, dtype=torch.float64), layer.mixer
    with torch.no_grad():
        projected = {key: getattr(mixer, key)(x).view(length, 2, 4) for key in ("q", "k", "v")}
        own = {key: getattr(mixer, f"global_{key}")(x).view(length, 2, 4) for key in projected if mixer.separate}
        mixed = torch.zeros(length, 2, 4, dtype=torch.float64)
        everywhere = {*range(params.num_global), *params.positions}
        for head, step in enumerate((1, 3) if params.dilated_heads else (1, 1)):
            near = {
                t * step
                for t in (range(params.window) if causal else range(-(params.window // 2), params.window // 2 + 1))
            }
            for i in range(length):
                source = own if own and i in everywhere else projected
                keys = [j for j in range(i + 1 if causal else length) if everywhere & {i, j} or i - j in near]
                scores = source["k"][keys, head] @ source["q"][i, head] / 2
                mixed[i, head] = scores.softmax(0) @ source["v"][keys, head]
        torch.testing.assert_close(mixer(x).y, mixer.o(mixed.view(1, length, 8)), rtol=1e-11, atol=1e-12)


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
            assert layout(state) == layout(module.state_at(2, seen))
        torch.testing.assert_close(torch.cat(pieces, dim=1), module(x).y, rtol=1e-10, atol=1e-11)


def test_the_state_does_not_grow_beyond_prefix_and_window():
    module = METHOD.make(Dims(seq_len=1), LongformerParams(window=512, num_global=16), "blocked", "cpu", torch.float32)
    assert {state.k[0].shape[2] for state in module.state_at(1, 527) + module.state_at(1, 131072)} == {16 + 511}


def test_dilated_heads_remember_further_back_than_the_others():
    params = LongformerParams(window=128, num_global=16, scattered="100+2000", dilation=4, dilated_heads=1)
    (state,) = METHOD.make(Dims(seq_len=1), params, "blocked", "cpu", torch.float32).state_at(1, 131072)
    assert [k.shape[1:3] for k in state.k] == [(3, 16 + 127), (1, 16 + 4 * 127)]
    assert state.scattered_k.shape[2] == 2
    assert state.global_k.shape[2] == 0


def test_all_tokens_are_kept_while_a_global_row_is_to_come():
    params = LongformerParams(window=8, num_global=0, scattered="100")
    for separate in (True, False):
        module = METHOD.make(Dims(seq_len=1), params.replace(separate_global=separate), "blocked", "cpu", torch.float32)
        before, after = (module.state_at(1, tokens)[0] for tokens in (100, 101))
        assert (before.global_k if separate else before.k[0]).shape[2] == 100
        assert (after.global_k.shape[2], after.k[0].shape[2]) == (0, 7)


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
    pattern = LongformerParams(window=4, num_global=2, dilation=2, scattered="6").pattern(causal)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        here, seen = [0, 1, 6], 7 if causal else 11
        rows = GlobalRows(q[:, :, here], k[:, :, :seen], v[:, :, :seen], tuple(here))
        return blocked.attend(q, k, v, rows, Scattered(k[:, :, [6]], v[:, :, [6]], (6,)), pattern)

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=True)


def test_half_precision_is_no_worse_than_the_reference():
    pattern = LongformerParams(window=64, num_global=4).pattern(causal=True)
    torch.manual_seed(0)
    exact = [torch.randn(1, 2, 300, 16, dtype=torch.float64) for _ in range(3)]
    calls = [
        (
            q,
            k,
            v,
            GlobalRows(q[:, :, :4], k[:, :, :4], v[:, :, :4], (0, 1, 2, 3)),
            Scattered(k[:, :, :0], v[:, :, :0], ()),
        )
        for q, k, v in (exact, [a.bfloat16() for a in exact])
    ]
    truth = reference.attend(*calls[0], pattern)
    own = (reference.attend(*calls[1], pattern).double() - truth).abs().max()
    assert (blocked.attend(*calls[1], pattern).double() - truth).abs().max() <= 2 * own


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 0}, "window must be at least 1, received 0"),
        ({"num_global": -1}, "num_global must be at least 0, received -1"),
        ({"dilation": 0}, "dilation must be at least 1, received 0"),
        ({"separate_global": 1}, "separate_global must be of type bool, received 1"),
        ({"scattered": "3,4"}, "scattered must be positions joined by [+], as in 100[+]2000, received '3,4'"),
    ],
    ids=["window", "num_global", "dilation", "separate_global", "scattered"],
)
def test_parameters_outside_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LongformerParams(**values)


def test_no_more_heads_can_be_dilated_than_there_are():
    answer = METHOD.mode_support("forward", Dims(seq_len=8, num_heads=2), LongformerParams(dilation=2, dilated_heads=3))
    assert answer.reason == "dilated_heads must be at most num_heads = 2, received 3"


@pytest.mark.parametrize("mode", ["stream", "decode"])
def test_a_bidirectional_layer_says_why_it_cannot_be_continued(mode):
    answer = METHOD.mode_support(mode, Dims(seq_len=8, causal=False), METHOD.params())
    assert not answer
    assert "cannot be continued" in answer.reason


@directions
@impls
@pytest.mark.parametrize("name", ["even", "scattered", "mixed_heads"])
def test_rotated_global_projections_equal_shared_ones_of_equal_weights(impl, name, causal):
    params, length = FORMS[name], 90
    dims = Dims(seq_len=length, d_model=8, num_heads=2, num_layers=1, causal=causal, position="rope")
    module = METHOD.make(dims, params, impl, "cpu", torch.float64)
    shared = METHOD.make(dims, params.replace(separate_global=False), impl, "cpu", torch.float64)
    weights = shared.state_dict()
    for letter, part in ((letter, part) for letter in "qkv" for part in ("weight", "bias")):
        weights[f"layers.0.mixer.global_{letter}.{part}"] = weights[f"layers.0.mixer.{letter}.{part}"]
    module.load_state_dict(weights)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = shared(x).y
        torch.testing.assert_close(module(x).y, whole, rtol=0, atol=1e-12)
        if causal:
            state, pieces = module.init_state(2), []
            for chunk in x.split([3, 40, 1, 46], dim=1):
                y, state = module(chunk, state)
                pieces.append(y)
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-12)
    plain = METHOD.make(dims.replace(position="none"), params, impl, "cpu", torch.float64)
    plain.load_state_dict(weights)
    assert not torch.allclose(plain(x).y, whole, rtol=0, atol=1e-3)


BANDS = {
    "window": LongformerParams(window=9, num_global=0),
    "wide": LongformerParams(window=400, num_global=0),
    "dilated": LongformerParams(window=4, num_global=0, dilation=3),
    "mixed_heads": LongformerParams(window=5, num_global=0, dilation=2, dilated_heads=1),
    "itself": LongformerParams(window=1, num_global=0),
}


@directions
@pytest.mark.parametrize("position", ["t5", "alibi"])
@pytest.mark.parametrize("name", BANDS)
def test_biases_by_distance_equal_a_full_masked_softmax(name, position, causal):
    """Outputs and gradients of both impls, T5's table included, against scores of all pairs with all biases."""
    params, length = BANDS[name], 150
    dims = Dims(seq_len=length, batch_size=2, d_model=8, num_heads=2, d_ff=0, causal=causal, position=position)
    x, results = torch.randn(2, length, 8, dtype=torch.float64), []
    for impl in ("full", "reference", "blocked"):
        torch.manual_seed(0)
        module = METHOD.make(dims, params, impl.replace("full", "reference"), "cpu", torch.float64)
        own = x.clone().requires_grad_()
        mixer = module.layers[0].mixer
        y = full(mixer, params, own, causal) if impl == "full" else mixer(own).y
        y.backward(x.flip(1))
        results.append([y.detach(), own.grad, *(p.grad for p in mixer.parameters())])
    assert len(results[0]) == 2 + 8 + (position == "t5")
    for found in results[1:]:
        for expected, seen in zip(results[0], found, strict=True):
            torch.testing.assert_close(seen, expected, rtol=0, atol=1e-11)
    if causal:
        state, pieces = mixer.init_state(2), []
        with torch.no_grad():
            for chunk in x.split([3, 80, 1, 66], dim=1):
                y, state = mixer(chunk, state)
                pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), results[0][0], rtol=0, atol=1e-12)


def full(mixer, params, x, causal):
    """All scores, biases and masks of a layer without globals, head by head."""
    length, heads = x.shape[1], mixer.num_heads
    distance = torch.arange(length) - torch.arange(length)[:, None]
    q, k, v = (project(x).unflatten(2, (heads, -1)).transpose(1, 2) for project in (mixer.q, mixer.k, mixer.v))
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5 + mixer.position.bias(distance, x.dtype)
    for group, pattern in params.groups(Dims(seq_len=length, d_model=8, num_heads=heads, causal=causal)):
        seen = [[j in pattern.sees(i, length) for j in range(length)] for i in range(length)]
        scores[:, group] = scores[:, group].masked_fill(~torch.tensor(seen), -torch.inf)
    return mixer.o((scores.softmax(3) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", METHOD.modes)
def test_biases_cost_no_products_and_one_table(mode):
    params = BANDS["dilated"]
    dims = Dims(seq_len=531, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=24, position="t5")
    for impl in ("reference", "blocked"):
        cost, values = METHOD.cost_of(impl, mode, True, "t5", params), bindings(dims, params, 4, 512)
        seen = trace(METHOD, dims, params, impl, mode)
        assert evaluate(total(cost.flops), values) == seen.flops
        assert evaluate(cost.num_parameters, values) == seen.num_parameters


def test_biases_are_refused_where_there_are_global_tokens():
    for params in (LongformerParams(), LongformerParams(num_global=0, scattered="3")):
        answer = METHOD.mode_support("forward", Dims(seq_len=8, position="t5"), params)
        assert "choose num_global=0" in answer.reason
