"""Shifted sparse attention against Llama's attention under masks, loops over tokens, and its published counts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.positions import Position, positions_for
from ctxbench.implementations.longlora import METHOD, blocked, reference
from ctxbench.implementations.longlora.layer import ShiftedAttention
from ctxbench.implementations.longlora.params import LongLoRAParams, group_size, reach
from ctxbench.method import Dims
from ctxbench.testing import HELD, LAWS, Case

GOLDEN = Path(__file__).parents[1] / "golden" / "longlora.npz"
OPERATORS = pytest.mark.parametrize("operator", [reference.attend, blocked.attend], ids=["reference", "blocked"])
PLAIN = Position()
WRAP = pytest.mark.parametrize("wrap", [False, True], ids=["open", "wrapped"])


def operands(tokens, heads=4, batch=2, width=3):
    generator = torch.Generator().manual_seed(0)
    # As projections hand them over: heads inside of tokens.
    shape = (batch, tokens, heads, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(3)]


def seen(i, tokens, group, shift, wrap):
    """Keys of one query, straight from the definition: boundaries every ``group`` tokens, from ``shift`` on."""
    keys = [j for j in range(i + 1) if (j - shift) // group == (i - shift) // group]
    if wrap and i < shift:
        boundary = max(range(shift, tokens + group, group))  # of what is filled up to whole groups
        while boundary - shift + group > math.ceil(tokens / group) * group:
            boundary -= group
        keys += [j for j in range(tokens) if j >= boundary]
    return keys


def looped(q, k, v, group, wrap):
    out = torch.zeros_like(q)
    B, H, T, D = q.shape
    for b, head, i in itertools.product(range(B), range(H), range(T)):
        keys = seen(i, T, group, 0 if head < H - H // 2 else group // 2, wrap)
        weights = torch.stack([q[b, head, i] @ k[b, head, j] / math.sqrt(D) for j in keys]).softmax(dim=0)
        out[b, head, i] = sum(w * v[b, head, j] for w, j in zip(weights, keys, strict=True))
    return out


@pytest.mark.parametrize(
    ("case", "params", "heads"),
    [
        ("quarter", LongLoRAParams(), 2),
        ("quarter_wrapped", LongLoRAParams(wrap=True), 2),
        ("half", LongLoRAParams(group=6), 4),
        ("half_wrapped", LongLoRAParams(group_fraction=0.5, wrap=True), 4),
        ("whole_wrapped", LongLoRAParams(group=8, wrap=True), 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@OPERATORS
def test_equals_llama_attention_under_a_mask_for_each_head(operator, case, params, heads):
    """Rotations by true positions, weights by name; the oracle takes softmax and angles in float32."""
    stored = np.load(GOLDEN)
    golden = {name.split("/")[1]: torch.from_numpy(stored[name]) for name in stored if name.split("/")[0] == case}
    dims = Dims(seq_len=golden["x"].shape[1], d_model=8, num_heads=heads, position="rope")
    mixer = ShiftedAttention(dims, params, operator, *positions_for(dims)).double()
    mixer.load_state_dict({name: golden[name] for name in mixer.state_dict()})
    x = golden["x"].requires_grad_()
    y = mixer(x).y
    y.backward(golden["grad"])
    torch.testing.assert_close(y, golden["y"], rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad, golden["grad.x"], rtol=0, atol=1e-5)
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grad.{name}"], rtol=0, atol=3e-5, msg=name)


@WRAP
@OPERATORS
@pytest.mark.parametrize(("tokens", "group"), [(1, 2), (3, 4), (5, 4), (7, 6), (9, 6), (12, 4), (13, 4), (14, 8)])
def test_equals_a_loop_over_tokens(operator, tokens, group, wrap):
    for heads in (1, 3, 4):
        q, k, v = operands(tokens, heads, batch=1)
        expected = looped(q, k, v, group, wrap)
        torch.testing.assert_close(operator(q, k, v, group, wrap, PLAIN), expected, rtol=0, atol=1e-13)


@WRAP
@pytest.mark.parametrize(("tokens", "group"), [(1, 2), (6, 8), (16, 4), (17, 4), (19, 4), (37, 10)])
def test_blocked_equals_reference_with_all_gradients(tokens, group, wrap):
    found = []
    for operator in (reference.attend, blocked.attend):
        inputs = [part.requires_grad_() for part in operands(tokens)]
        y = operator(*inputs, group, wrap, PLAIN)
        found.append([y, *torch.autograd.grad(y, inputs, y.detach().cos())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@OPERATORS
def test_the_circle_changes_exactly_the_first_half_group_of_half_of_the_heads(operator):
    q, k, v = operands(24)
    changed = ((operator(q, k, v, 8, True, PLAIN) - operator(q, k, v, 8, False, PLAIN)).abs() > 1e-9).any(dim=3)
    expected = torch.zeros(4, 24, dtype=torch.bool)
    expected[2:, :4] = True
    assert (changed == expected).all()
    moved = v.clone()
    moved[:, :, 20:] += 1
    leaked = (operator(q, k, moved, 8, True, PLAIN) - operator(q, k, v, 8, True, PLAIN)).abs() > 1e-9
    assert leaked.any(dim=3)[0, 2, :4].all(), "the first tokens see the last four"


@pytest.mark.parametrize(
    ("params", "causal", "reason"),
    [
        (LongLoRAParams(wrap=True), True, "the first tokens of half of the heads see the last ones"),
        (LongLoRAParams(), False, "groups are causal"),
    ],
)
def test_a_direction_that_the_shift_does_not_have_is_refused(params, causal, reason):
    answer = METHOD.mode_support("forward", Dims(seq_len=64, causal=causal), params)
    assert not answer
    assert reason in answer.reason


def test_inference_is_left_to_dense_attention():
    for mode in ("stream", "decode"):
        answer = METHOD.mode_support(mode, Dims(seq_len=64), METHOD.params())
        assert "inference is dense attention with the same weights" in answer.reason


def test_groups_are_even_and_fractions_exact():
    with pytest.raises(ValueError, match=r"group must be even, .* received 7"):
        LongLoRAParams(group=7)
    assert [group_size(tokens, LongLoRAParams()) for tokens in (1, 8, 12, 4096)] == [2, 2, 4, 1024]
    assert group_size(2000, LongLoRAParams(group_fraction=0.1)) == 200
    assert group_size(4096, LongLoRAParams(group=512)) == 512


def test_reach_grows_by_half_a_group_a_layer():
    dims, params = Dims(seq_len=64), LongLoRAParams(group=8)
    assert [reach(dims.replace(num_layers=layers), params, 41).start for layers in (1, 2, 3)] == [36, 32, 28]
    assert reach(dims, params.replace(wrap=True), 1) == {0, 1, 60, 61, 62, 63}


# Laws and cost.

VARIANTS = {
    "fixed": (LongLoRAParams(group=6), 20),
    "tenth": (LongLoRAParams(group_fraction=0.1), 31),
    "wrapped": (LongLoRAParams(group=8, wrap=True), 24),
    "wrapped-ragged": (LongLoRAParams(wrap=True), 18),
}


def law_cases():
    rounds = [
        *itertools.product(VARIANTS, ("reference", "blocked"), ("flops_equal_formula",)),
        *itertools.product(
            VARIANTS, ("blocked",), ("receptive_field", "agreement", "batch_independence", "any_length", "gradcheck")
        ),
        *itertools.product(("fixed", "tenth"), ("reference", "blocked"), ("causality",)),
    ]
    return [pytest.param(*each, id="-".join(each)) for each in rounds]


@pytest.mark.parametrize(("variant", "impl", "law"), law_cases())
def test_every_variant_keeps_the_law(variant, impl, law):
    params, tokens = VARIANTS[variant]
    dims = Dims(tokens, 2, 16, 4, 2, 32, causal=not params.wrap)
    finding = LAWS[law](Case(METHOD, impl, params, dims, METHOD.modes))
    assert finding.status == HELD, finding.message


def pairs(tokens, params, heads=2):
    dims = Dims(seq_len=tokens, d_model=heads, num_heads=heads, d_ff=0, causal=not params.wrap)
    cost = METHOD.cost_of("blocked", "forward", dims.causal, "none", params)
    return evaluate(cost.flops["attention"], bindings(dims, params, 4, 512)) // 4  # over all heads of width 1


def test_pairs_are_the_published_counts():
    assert pairs(4096, LongLoRAParams()) == 2 * 1_968_128
    assert pairs(4096, LongLoRAParams(wrap=True)) - pairs(4096, LongLoRAParams()) == 1024**2 // 4
    assert pairs(4096, LongLoRAParams()) / 2 / 4096**2 == pytest.approx(0.117, abs=0.0005)


@WRAP
def test_pairs_equal_the_sum_over_tokens(wrap):
    for tokens, group, heads in itertools.product((1, 4, 7, 16, 29), (2, 6, 8), (1, 3, 4)):
        shifts = [0] * (heads - heads // 2) + [group // 2] * (heads // 2)
        counted = sum(len(seen(i, tokens, group, shift, wrap)) for shift in shifts for i in range(tokens))
        assert pairs(tokens, LongLoRAParams(group=group, wrap=wrap), heads) == counted, (tokens, group, heads)


@pytest.mark.parametrize(("params", "order"), [(LongLoRAParams(), "O(T^2)"), (LongLoRAParams(group=512), "O(T)")])
def test_only_a_fixed_group_is_linear(params, order):
    cost = METHOD.cost_of("blocked", "train", True, "none", params)
    assert big_o(total(cost.flops)) == order
    assert big_o(cost.peak_bytes) == "O(T)"


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_peaks_hold_with_several_layers_rows_and_ragged_groups(impl, mode):
    dims = Dims(seq_len=1100, batch_size=2, d_model=64, num_heads=4, num_layers=2, d_ff=128)
    for params in (LongLoRAParams(), LongLoRAParams(group=128)):
        cost, result = METHOD.cost_of(impl, mode, True, "none", params), trace(METHOD, dims, params, impl, mode)
        values = bindings(dims, params, 4, 512)
        assert evaluate(total(cost.flops), values) == result.flops
        assert result.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)


def test_blocked_keeps_no_scores():
    """A group squared would be 16 MB a head."""
    result = trace(METHOD, Dims(seq_len=8192, d_model=64, num_heads=4, d_ff=0), METHOD.params(), "blocked", "train")
    assert result.peak_bytes < 16 * 8192 * 64 * 4
    assert set(result.by_op) == {
        "aten.addmm",
        "aten.mm",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward",
    }
