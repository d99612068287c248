"""Biases by distance inside the groups of shifted sparse attention: against a loop over tokens, and what they cost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.positions import T5Bias, bucket, positions_for
from ctxbench.implementations.longlora import METHOD, blocked, reference
from ctxbench.implementations.longlora import triton as native
from ctxbench.implementations.longlora.params import LongLoRAParams
from ctxbench.method import Dims

OPERATORS = pytest.mark.parametrize(
    "operator", [reference.attend, blocked.attend, native.attend], ids=["reference", "blocked", "native"]
)
POSITION = pytest.mark.parametrize("position", ["t5", "alibi"])
WRAP = pytest.mark.parametrize("wrap", [False, True], ids=["open", "wrapped"])
SLOPES = {1: [2**-8], 3: [2**-4, 2**-8, 2**-2], 4: [2**-2, 2**-4, 2**-6, 2**-8]}  # Press et al. 2022


def encoding(position, heads, wrap):
    torch.manual_seed(1)
    encoded = positions_for(Dims(64, d_model=4 * heads, num_heads=heads, causal=not wrap, position=position))[0]
    return encoded.double()


def operands(tokens, heads=4, batch=2, width=3):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, tokens, heads, width)  # as projections hand them over: heads inside of tokens
    return [torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(3)]


def sees(i, j, tokens, group, shift, wrap):
    """Whether query i sees key j, from the definition; the circle closes as if there were whole groups."""
    if j <= i:
        return (i + shift) // group == (j + shift) // group
    return wrap and i < shift and j >= math.ceil(tokens / group) * group - shift


def looped(q, k, v, group, wrap, encoded):
    """``softmax_j(q_i k_j / sqrt(D) + b(j - i)) v_j`` over the keys that i sees, pair by pair."""
    out = torch.zeros_like(q)
    _, H, T, D = q.shape
    for head, i in itertools.product(range(H), range(T)):
        shift = 0 if head < H - H // 2 else group // 2
        scores, keys = [], [j for j in range(T) if sees(i, j, T, group, shift, wrap)]
        for j in keys:
            if isinstance(encoded, T5Bias):
                added = encoded.table.weight[bucket(torch.tensor(j - i), not wrap), head]
            else:
                added = -SLOPES[H][head] * abs(j - i)
            scores.append((q[:, head, i] * k[:, head, j]).sum(dim=1) / math.sqrt(D) + added)
        weights = torch.stack(scores).softmax(dim=0)
        out[:, head, i] = sum(w[:, None] * v[:, head, j] for w, j in zip(weights, keys, strict=True))
    return out


@WRAP
@POSITION
@OPERATORS
@pytest.mark.parametrize(("tokens", "group"), [(1, 2), (5, 4), (13, 4), (14, 8), (27, 10)])
def test_equals_a_loop_over_tokens(operator, tokens, group, position, wrap):
    for heads in SLOPES:
        q, k, v = operands(tokens, heads, batch=1)
        encoded = encoding(position, heads, wrap)
        with torch.no_grad():
            expected = looped(q, k, v, group, wrap, encoded)
            found = operator(q, k, v, group, wrap, encoded)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@WRAP
@POSITION
@pytest.mark.parametrize("operator", [blocked.attend, native.attend], ids=["blocked", "native"])
@pytest.mark.parametrize(
    ("tokens", "group"), [(37, 10), (270, 280), (490, 260)], ids=["ragged", "slabs of the circle", "slabs of a group"]
)
def test_equals_reference_with_all_gradients(operator, tokens, group, position, wrap):
    """Several slabs a group, distances beyond T5's farthest, and a circle whose first slabs have far keys."""
    found = []
    for each in (reference.attend, operator):
        encoded = encoding(position, 4, wrap)
        inputs = [part.requires_grad_() for part in operands(tokens)]
        y = each(*inputs, group, wrap, encoded)
        of = [*inputs, *encoded.parameters()]
        found.append([y, *torch.autograd.grad(y, of, y.detach().cos())])
    assert len(found[0]) == 4 + (position == "t5")
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


VARIANTS = {
    "fixed": (LongLoRAParams(group=140), 900),
    "quarter": (LongLoRAParams(), 1101),
    "wrapped": (LongLoRAParams(group=260, wrap=True), 490),
    "wrapped, no circle": (LongLoRAParams(group=200, wrap=True), 799),
}


@POSITION
@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("name", VARIANTS)
def test_biases_cost_no_products_and_one_table(name, mode, position):
    params, tokens = VARIANTS[name]
    dims = Dims(tokens, 2, 24, 3, 2, 32, causal=not params.wrap, position=position)
    for impl in ("reference", "blocked", "native"):
        cost, values = METHOD.cost_of(impl, mode, dims.causal, position, params), bindings(dims, params, 4, 512)
        seen = trace(METHOD, dims, params, impl, mode)
        assert evaluate(total(cost.flops), values) == seen.flops, impl
        assert evaluate(cost.num_parameters, values) == seen.num_parameters
        assert not seen.uncounted


@POSITION
@pytest.mark.parametrize("mode", METHOD.modes)
def test_no_bias_grows_with_the_square_of_the_length(mode, position):
    """Of one group there is one, whatever the number of groups; the reference has one for each."""
    params = LongLoRAParams(group=256)

    def peak(impl, tokens):
        dims = Dims(tokens, d_model=64, num_heads=4, d_ff=0, position=position)
        return trace(METHOD, dims, params, impl, mode).peak_bytes

    for impl in ("blocked", "native"):
        assert peak(impl, 16384) < 2.02 * peak(impl, 8192) < 2.02 * peak("reference", 8192)
