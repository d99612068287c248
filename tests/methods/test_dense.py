"""Dense attention against oracles that share no code with it, and by brute force."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import products_table
from ctxbench.implementations._shared.positions import Position, Rotary, positions_for, sinusoids
from ctxbench.implementations._shared.staircase import BLOCK
from ctxbench.implementations.dense import METHOD, blocked, reference, slabs
from ctxbench.implementations.dense.layer import Attention
from ctxbench.method import DTYPE_BYTES, Dims
from ctxbench.workload import as_output

DIMS = Dims(seq_len=13, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=40)
IMPLS = [impl.name for impl in METHOD.impls if "cpu" in impl.devices]
BOTH = ("reference", "blocked")  # impls that take every position
OPERATORS = pytest.mark.parametrize("operator", [reference.attend, blocked.attend], ids=BOTH)
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "positions.npz"))
DISTANCES = ("transformer_xl", "t5", "alibi")  # encodings that blocked computes by slabs


def build(impl: str, dims: Dims) -> nn.Module:
    torch.manual_seed(1)
    module = METHOD.make(dims, METHOD.params(), impl, "cpu", torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def torch_layer(layer: nn.Module, dims: Dims) -> nn.TransformerEncoderLayer:
    """PyTorch's own pre-norm layer, with the weights of one of ours."""
    theirs = nn.TransformerEncoderLayer(
        dims.d_model, dims.num_heads, dims.d_ff, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    mixer = layer.mixer
    names = {"norm1": layer.norm_mixer, "norm2": layer.norm_ffn, "linear1": layer.ffn.up, "linear2": layer.ffn.down}
    names["self_attn.out_proj"] = mixer.o
    state = {f"{name}.{part}": getattr(ours, part) for name, ours in names.items() for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        packed = torch.cat([getattr(projection, part) for projection in (mixer.q, mixer.k, mixer.v)])
        state[f"self_attn.in_proj_{part}"] = packed
    theirs.load_state_dict(state)
    return theirs.train()  # evaluation mode takes a fused path with a rounding of its own


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_encoder_layer_of_pytorch(impl: str, causal: bool) -> None:
    dims = DIMS.replace(causal=causal)
    module = build(impl, dims)
    x = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    y = as_output(module(x)).y
    mask = nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64) if causal else None
    expected = x
    for layer in module.layers:
        expected = torch_layer(layer, dims)(expected, src_mask=mask, is_causal=causal)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    if METHOD.impl_support(METHOD.impl(impl), "train", dims, METHOD.params(), "cpu", "fp64"):
        (mine,), (theirs,) = (torch.autograd.grad(out, x, grad) for out in (y, expected))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@OPERATORS
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 9), (9, 9)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_operator_equals_the_unfused_kernel_of_pytorch(operator, queries: int, keys: int, causal: bool) -> None:
    torch.manual_seed(2)
    q = torch.randn(2, 3, queries, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 3, keys, 8, dtype=torch.float64) for _ in range(2))
    visible = torch.tensor([[not causal or j <= keys - queries + i for j in range(keys)] for i in range(queries)])
    with sdpa_kernel(SDPBackend.MATH):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(operator(q, k, v, causal, Position()), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_decoding_token_by_token_equals_the_whole_sequence(impl: str) -> None:
    module, x = build(impl, DIMS), torch.randn(2, 13, 16, dtype=torch.float64)
    state, pieces = module.init_state(2), []
    for token in x.split(1, dim=1):
        y, state = module(token, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), as_output(module(x)).y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 7, 512, 513, 1025, 1500])
def test_streamed_pairs_equal_a_sum_over_the_calls(length: int) -> None:
    dims = DIMS.replace(seq_len=length)
    values = bindings(dims, METHOD.params(), 4, 512)
    calls = [(min(512, length - start), min(start + 512, length)) for start in range(0, length, 512)]
    rectangle = sum(queries * keys for queries, keys in calls)
    first = min(512, length)
    for impl, pairs in (("reference", rectangle), ("blocked", rectangle - first * (first - 1) // 2)):
        cost = METHOD.cost_of(impl, "stream", True, "none", METHOD.params())
        assert evaluate(cost.flops["attention"], values) == 2 * 4 * 2 * 16 * pairs


def test_textbook_total_of_a_wide_layer() -> None:
    """24 B T d^2 + 4 B d P with f = 4 d, the form every estimate starts from."""
    dims = Dims(seq_len=1000, batch_size=3, d_model=64, num_heads=4, d_ff=256)
    cost = METHOD.cost_of("blocked", "forward", True, "none", METHOD.params())
    expected = 24 * 3 * 1000 * 64**2 + 4 * 3 * 64 * (1000 * 1001 // 2)
    assert evaluate(total(cost.flops), bindings(dims, METHOD.params(), 4, 512)) == expected


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    "changes",
    [{"d_ff": 0, "batch_size": 1}, {"num_layers": 3, "batch_size": 2}, {"d_ff": 2048, "batch_size": 8}],
    ids=["no FFN", "three layers", "wide FFN"],
)
def test_peak_formula_is_exact_at_other_shapes(mode: str, impl: str, changes: dict) -> None:
    dims = Dims(seq_len=1411, d_model=64, num_heads=4, d_ff=256).replace(**changes)
    cost = METHOD.cost_of(impl, mode, True, "none", METHOD.params())
    formula = evaluate(cost.peak_bytes, bindings(dims, METHOD.params(), 4, 512))
    seen = trace(METHOD, dims, METHOD.params(), impl, mode).peak_bytes
    assert seen == pytest.approx(formula, rel=1e-3)


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("length", "dtype", "changes"),
    [
        (733, "fp32", {"num_layers": 3, "batch_size": 2, "d_ff": 0}),
        (1111, "bf16", {"num_layers": 2}),
        (1601, "fp32", {"position": "rope_yarn"}),
    ],
)
def test_peak_formula_is_exact_with_rotations(mode: str, impl: str, length: int, dtype: str, changes: dict) -> None:
    dims = Dims(seq_len=length, d_model=64, num_heads=2, num_layers=1, d_ff=256, position="rope").replace(**changes)
    cost = METHOD.cost_of(impl, mode, True, dims.position, METHOD.params())
    values = bindings(dims, METHOD.params(), DTYPE_BYTES[dtype], 512)
    assert evaluate(cost.peak_bytes, values) == trace(METHOD, dims, METHOD.params(), impl, mode, dtype).peak_bytes


def golden(name: str, scaled: bool = True) -> dict[str, torch.Tensor]:
    """Weights, inputs and gradients of one of transformers' layers under the names of ours."""
    found = {key.partition("/")[2]: torch.from_numpy(a) for key, a in GOLDEN.items() if key.startswith(f"{name}/")}
    for part in ("weight", "bias"):
        for prefix in ("", "grad.") if f"qkv.{part}" in found else ():  # BLOOM: queries, keys and values of each head
            packed = found.pop(f"{prefix}qkv.{part}").unflatten(0, (3, 3, 4))
            found |= {f"{prefix}{letter}.{part}": packed[:, i].flatten(0, 1) for i, letter in enumerate("qkv")}
    if not scaled:  # T5 does not divide its scores by the root of the head width: its queries are longer instead
        found["q.weight"] = found["q.weight"] * 4**0.5
        found["grad.q.weight"] = found["grad.q.weight"] / 4**0.5
    return found


@OPERATORS
@pytest.mark.parametrize("name", ["llama_default", "llama_yarn", "t5_causal", "t5_bidirectional", "bloom"])
def test_positions_equal_those_of_transformers(operator, name: str) -> None:
    package, _, kind = name.partition("_")
    dims = Dims(seq_len=11, d_model=12, num_heads=3, causal=kind != "bidirectional", position="t5")
    tolerance = {"llama": 1e-5, "bloom": 1e-6, "t5": 1e-12}[package]  # float32 inside: angles, softmax, nothing
    if package == "llama":
        position = Rotary(4)
        if kind == "yarn":
            position = Rotary(4, "rope_yarn", 8.0, original_length=64)
    else:
        encoding = "alibi" if package == "bloom" else "t5"
        (position,) = positions_for(dims.replace(position=encoding))
    ours = Attention(dims, operator, position).double()
    theirs = golden(name, scaled=package != "t5")
    weights = {key: theirs.get(key, torch.zeros_like(value)) for key, value in ours.state_dict().items()}
    ours.load_state_dict(weights)
    x = theirs["x"].requires_grad_()
    y = ours(x).y
    y.backward(theirs["grad"])
    torch.testing.assert_close(y, theirs["y"], rtol=0, atol=tolerance)
    found = {"x": x.grad} | {key: parameter.grad for key, parameter in ours.named_parameters()}
    compared = [key for key in found if f"grad.{key}" in theirs]
    assert len(compared) == {"llama": 5, "t5": 6, "bloom": 9}[package]
    for key in compared:
        torch.testing.assert_close(found[key], theirs[f"grad.{key}"], rtol=0, atol=20 * tolerance)


@OPERATORS
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_relative_term_equals_a_loop_over_pairs(operator, causal: bool) -> None:
    dims = Dims(seq_len=9, d_model=8, num_heads=2, causal=causal, position="transformer_xl")
    (term,) = positions_for(dims)
    term.double()
    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64)
    q = q[:, :, 5:]  # four queries after five cached keys
    expected = torch.zeros_like(q)
    for b, head, row in np.ndindex(2, 2, 4):
        i, scores = 5 + row, []
        keys = range(i + 1) if causal else range(9)
        for j in keys:
            r = term.r.weight[4 * head : 4 * head + 4] @ sinusoids(torch.tensor([i - j], dtype=torch.float64), 8)[0]
            own = q[b, head, row]
            score = (own + term.content_bias[head]) @ k[b, head, j] + (own + term.position_bias[head]) @ r
            scores.append(score / math.sqrt(4))
        expected[b, head, row] = torch.stack(scores).softmax(0) @ v[b, head, keys.start : keys.stop]
    torch.testing.assert_close(operator(q, k, v, causal, term), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("position", DISTANCES)
def test_slabs_equal_the_whole_rectangle_with_all_gradients(position: str, causal: bool) -> None:
    dims = DIMS.replace(seq_len=2 * BLOCK + 5, causal=causal, position=position, num_layers=1, d_ff=0)
    x, results = torch.randn(2, dims.seq_len, 16, dtype=torch.float64), []
    for impl in BOTH:
        module, own = build(impl, dims), x.clone().requires_grad_()
        y = as_output(module(own)).y
        y.backward(x.flip(1))
        with torch.no_grad():
            results.append([y, as_output(module(x)).y, own.grad, *(p.grad for p in module.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("position", METHOD.positions[1:])
@pytest.mark.parametrize("impl", BOTH)
def test_streaming_with_positions_equals_the_whole_sequence(impl: str, position: str) -> None:
    """Built for more tokens than the original length, so that the extensions of RoPE are not RoPE itself."""
    module = build(impl, DIMS.replace(seq_len=5000, position=position))
    x = torch.randn(2, BLOCK + 20, 16, dtype=torch.float64)
    state, pieces = module.init_state(2), []
    with torch.no_grad():
        for chunk in x.split([7, BLOCK + 2, 1, 10], dim=1):
            y, state = module(chunk, state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), as_output(module(x)).y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", METHOD.positions)
@pytest.mark.parametrize("impl", BOTH)
def test_counted_work_and_weights_equal_the_formula(impl: str, position: str) -> None:
    """At lengths of several slabs, in both directions; a chunk of the stream is several slabs too."""
    for mode in METHOD.modes:
        for length, causal in ((BLOCK, False), (2 * BLOCK + 9, False), (1100, True)):
            dims = Dims(seq_len=length, batch_size=2, d_model=32, num_heads=4, d_ff=0, causal=causal, position=position)
            if not METHOD.mode_support(mode, dims, METHOD.params()):
                continue
            cost, seen = METHOD.cost_of(impl, mode, causal, position, METHOD.params()), trace(
                METHOD, dims, METHOD.params(), impl, mode)  # fmt: skip
            values = bindings(dims, METHOD.params(), 4, 512)
            assert evaluate(total(cost.flops), values) == seen.flops, (mode, length, causal)
            assert evaluate(cost.num_parameters, values) == seen.num_parameters
            assert not seen.uncounted


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("position", DISTANCES)
def test_blocked_keeps_no_scores(position: str, mode: str) -> None:
    """Eight heads' scores of 4k tokens would be 512 MiB."""
    dims = Dims(seq_len=4096, d_model=64, num_heads=8, d_ff=0, position=position)
    assert trace(METHOD, dims, METHOD.params(), "blocked", mode).peak_bytes < 100 * 2**20


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("keys", [300, 421], ids=["whole", "after a cache"])
def test_slabs_of_few_heads_equal_the_reference_with_gradients(keys: int, causal: bool, monkeypatch) -> None:
    monkeypatch.setattr(products_table, "SCORES", 2 * 300 * keys)  # two of the three heads of a sequence at a time
    torch.manual_seed(3)
    operands = [torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (300, keys, keys)]
    mine, expected = (attend(*operands, causal, Position()) for attend in (slabs.attend, reference.attend))
    grad = torch.randn_like(expected)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(mine, operands, grad), torch.autograd.grad(expected, operands, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_slabs_are_for_bf16_and_add_nothing_to_scores() -> None:
    impl = METHOD.impl("slabs")
    assert METHOD.impl_support(impl, "forward", DIMS, METHOD.params(), "cpu", "bf16")
    assert "not in fp32" in METHOD.impl_support(impl, "forward", DIMS, METHOD.params(), "cpu", "fp32").reason
    biased = METHOD.impl_support(impl, "forward", DIMS.replace(position="t5"), METHOD.params(), "cpu", "bf16")
    assert "t5" in biased.reason
