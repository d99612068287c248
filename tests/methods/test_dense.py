"""Dense attention against oracles that share no code with it, and by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.implementations.dense import METHOD, blocked, reference
from ctxbench.method import Dims
from ctxbench.workload import as_output

DIMS = Dims(seq_len=13, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=40)
IMPLS = [impl.name for impl in METHOD.impls]


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
    (mine,) = torch.autograd.grad(y, x, grad)
    mask = nn.Transformer.generate_square_subsequent_mask(13, dtype=torch.float64) if causal else None
    expected = x
    for layer in module.layers:
        expected = torch_layer(layer, dims)(expected, src_mask=mask, is_causal=causal)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("operator", [reference.attend, blocked.attend], ids=["reference", "blocked"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 9), (9, 9)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_operator_equals_the_unfused_kernel_of_pytorch(operator, queries: int, keys: int, causal: bool) -> None:
    torch.manual_seed(2)
    q = torch.randn(2, 3, queries, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 3, keys, 8, dtype=torch.float64) for _ in range(2))
    visible = torch.tensor([[not causal or j <= keys - queries + i for j in range(keys)] for i in range(queries)])
    with sdpa_kernel(SDPBackend.MATH):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(operator(q, k, v, causal), expected, rtol=0, atol=1e-14)


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
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "changes",
    [{"d_ff": 0, "batch_size": 1}, {"num_layers": 3, "batch_size": 2}, {"d_ff": 2048, "batch_size": 8}],
    ids=["no FFN", "three layers", "wide FFN"],
)
def test_peak_formula_is_exact_at_other_shapes(mode: str, impl: str, changes: dict) -> None:
    from ctxbench.cost.trace import trace

    dims = Dims(seq_len=1411, d_model=64, num_heads=4, d_ff=256).replace(**changes)
    cost = METHOD.cost_of(impl, mode, True, "none", METHOD.params())
    formula = evaluate(cost.peak_bytes, bindings(dims, METHOD.params(), 4, 512))
    seen = trace(METHOD, dims, METHOD.params(), impl, mode).peak_bytes
    assert seen == pytest.approx(formula, rel=1e-3)
