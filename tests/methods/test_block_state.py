"""Block attention with a state: parity with GPT-2 and GRUCell, a loop over tokens, streaming, the state, and counts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations.block_state import METHOD
from ctxbench.implementations.block_state.params import BlockStateParams
from ctxbench.method import Dims
from ctxbench.testing import HELD, LAWS, laws_for, streamed
from ctxbench.testing.case import Case
from ctxbench.workload import map_state, num_parameters, prepare, state_bytes, tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "block_state.npz"
PARITY = {
    "bottom/gru": BlockStateParams(block_len=4, num_states=1, update="gru"),
    "bottom/mlp": BlockStateParams(block_len=4, num_states=3, pool="last"),
    "layer/gru": BlockStateParams(block_len=4, num_states=2, update="gru", variant="layer", pool="last"),
    "layer/mlp": BlockStateParams(block_len=4, num_states=1, variant="layer"),
}
LENGTH = 19
SIZES = Dims(seq_len=LENGTH, batch_size=2, d_model=8, num_heads=2, d_ff=12, num_layers=2)
forms = pytest.mark.parametrize("params", PARITY.values(), ids=PARITY)
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


def build(impl: str, params: BlockStateParams, **dims: int | str) -> torch.nn.Module:
    torch.manual_seed(0)
    return METHOD.make(SIZES.replace(**dims), params, impl, "cpu", torch.float64)


def tokens(length: int = LENGTH, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@impls
@pytest.mark.parametrize("name", PARITY)
def test_outputs_and_gradients_equal_those_of_gpt2_and_its_updates(impl, name):
    golden = {
        key.removeprefix(f"{name}/"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(f"{name}/")
    }
    module, x = build(impl, PARITY[name]), golden["x"].clone().requires_grad_()
    module.load_state_dict({key: golden[key] for key in module.state_dict()})
    y = module(x).y
    y.backward(golden["grad"])
    found = {"y": y, "grad.x": x.grad, **{f"grad.{key}": p.grad for key, p in module.named_parameters()}}
    assert len(found) + len(module.state_dict()) + 2 == len(golden)
    for key, value in found.items():
        scale = max(1.0, float(golden[key].abs().max()))
        torch.testing.assert_close(value, golden[key], rtol=0, atol=1e-11 * scale)


def oracle(module: torch.nn.Module, x: torch.Tensor, params: BlockStateParams) -> torch.Tensor:
    """One batch row, a row of a block at a time: each looks back at the rows of its block, states first."""
    states = [update.initial for update in module.updates]
    outputs = []
    for block in x[0].split(params.block_len):
        made = []
        for index, layer in enumerate(module.layers):
            rows = torch.cat((states[index], block)) if index < len(states) else block
            H, D = layer.mixer.num_heads, layer.mixer.head_dim
            after = []
            for i, row in enumerate(rows):
                normed = layer.norm_mixer(rows[: i + 1])
                heads = []
                for head in range(H):
                    part = slice(head * D, (head + 1) * D)
                    q = layer.mixer.q(normed[i])[part]
                    scores = layer.mixer.k(normed)[:, part] @ q / math.sqrt(D)
                    heads.append(scores.softmax(0) @ layer.mixer.v(normed)[:, part])
                row = row + layer.mixer.o(torch.cat(heads))
                after.append(row + layer.ffn(layer.norm_ffn(row)))
            block = torch.stack(after)
            if index >= len(module.layers) - len(states):
                block = block[params.num_states :]
                made.append(block.mean(dim=0) if params.pool == "mean" else block[-1])
        outputs.append(block)
        states = [
            torch.stack([step(update, state, pooled) for state in old])
            for update, old, pooled in zip(module.updates, states, made, strict=True)
        ]
    return torch.cat(outputs)[None]


def step(update: torch.nn.Module, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    if update.gru is None:
        return s + update.down(torch.nn.functional.gelu(update.up(torch.cat((s, r)))))
    unit = update.gru
    into, old = unit.weight_ih @ r + unit.bias_ih, unit.weight_hh @ s + unit.bias_hh
    reset, keep, new = zip(into.chunk(3), old.chunk(3), strict=True)
    reset, keep = torch.sigmoid(sum(reset)), torch.sigmoid(sum(keep))
    return (1 - keep) * torch.tanh(new[0] + reset * new[1]) + keep * s


@forms
def test_reference_equals_a_loop_over_rows(params):
    module, x = build("reference", params), tokens(11, batch=1)
    again, mine, theirs = build("reference", params), x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(mine).y, oracle(again, theirs, params)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)
    for ours, oracles in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, oracles.grad, rtol=0, atol=1e-10)


@forms
@pytest.mark.parametrize("position", ["none", "rope"])
def test_blocked_equals_reference_with_all_gradients(params, position):
    results = []
    for impl in ("reference", "blocked"):
        module, x = build(impl, params, position=position), tokens().requires_grad_()
        y = module(x).y
        y.backward(torch.ones_like(y) + x.detach())
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)


@impls
@forms
@pytest.mark.parametrize("position", ["none", "rope"])
def test_streaming_equals_the_whole_sequence_for_any_cut(impl, params, position):
    module, x = build(impl, params, position=position), tokens()
    with torch.no_grad():
        whole = module(x).y
        for sizes in ([3, 1, 1, 7, 7], [4, 12, 3], [1] * LENGTH):
            torch.testing.assert_close(streamed(module, x, sizes).y, whole, rtol=0, atol=1e-12)


@forms
def test_state_has_the_declared_size_after_every_token_and_is_a_value(params):
    module, x = build("blocked", params), tokens()
    formula = METHOD.cost_of("blocked", "stream", True, "none", params).state_bytes
    state = module.init_state(2)
    for t in range(LENGTH):
        before = map_state(torch.clone, state)
        with torch.no_grad():
            after = module(x[:, t : t + 1], state).state
        assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(state), strict=True))
        values = bindings(SIZES.replace(seq_len=t + 1), params, 8, METHOD.segment_len(params))
        assert state_bytes(after) == evaluate(formula, values)
        assert [a.shape for a in tensors(module.state_at(2, t + 1))] == [a.shape for a in tensors(after)]
        state = after


@impls
@forms
def test_what_crosses_a_block_is_the_state_alone(impl, params):
    module, x = build(impl, params), tokens(8)
    other = tokens(9)[:, :8]
    other[:, 4:] = x[:, 4:]
    with torch.no_grad():
        a, b = (module(first, module.init_state(2)).state for first in (x[:, :4], other[:, :4]))
        carried = a._replace(vectors=b.vectors)
        assert not torch.allclose(module(x[:, 4:], a).y, module(x[:, 4:], b).y)
        torch.testing.assert_close(module(x[:, 4:], carried).y, module(x[:, 4:], b).y, rtol=0, atol=0)


@forms
def test_variants_keep_the_laws(params):
    names = ("causality", "receptive_field", "batch_independence", "streaming_equals_whole", "state_shapes", "purity")
    names += ("gradients_reach_everything", "gradcheck", "two_training_steps")
    for law, case in laws_for(METHOD):
        if str(law) in names and case.label == "" and case.impl == "blocked":
            chosen = dataclasses.replace(case, params=params, dims=case.dims.replace(seq_len=11))
            finding = law(chosen)
            assert finding.status == "held", finding


@impls
@pytest.mark.parametrize("mode", METHOD.modes)
@forms
def test_formulas_equal_what_is_counted(impl, mode, params):
    formula = METHOD.cost_of(impl, mode, True, "none", params)
    for length, layers in ((3, 1), (4, 3), (LENGTH, 2)):
        dims = SIZES.replace(seq_len=length, num_layers=layers)
        work, values = prepare(METHOD, dims, params, impl, mode, "fp32"), bindings(dims, params, 4, params.block_len)
        with Meter() as meter:
            work.call()
        assert evaluate(total(formula.flops), values) == meter.result().flops
        assert evaluate(formula.num_parameters, values) == num_parameters(work.module)
        assert not meter.result().uncounted


@pytest.mark.parametrize("variant", ["bottom", "layer"])
@pytest.mark.parametrize("mode", ["forward", "stream", "decode"])
@impls
def test_peak_formula_is_within_three_percent(impl, mode, variant):
    params, dims = BlockStateParams(variant=variant), Dims(seq_len=5000, batch_size=2, num_layers=3, d_ff=512)
    values = bindings(dims, params, 4, METHOD.segment_len(params))
    formula = evaluate(METHOD.cost_of(impl, mode, True, "none", params).peak_bytes, values)
    assert formula == pytest.approx(trace(METHOD, dims, params, impl, mode).peak_bytes, rel=0.03)


def test_chain_of_steps_is_a_sum_where_each_layer_has_its_own_state():
    values = bindings(Dims(seq_len=65536, num_layers=12), BlockStateParams(), 4, 2048)
    depths = {}
    for variant in ("bottom", "layer"):
        cost = METHOD.cost_of("blocked", "forward", True, "none", BlockStateParams(variant=variant))
        depths[variant] = evaluate(cost.depth, values)
    assert depths == {"bottom": 12 * 32, "layer": 12 + 31}


def test_fused_kernel_refuses_a_bias_by_distance():
    answer = METHOD.impl_support(
        METHOD.impl("blocked"), "forward", Dims(seq_len=8, position="t5"), BlockStateParams(), "cpu", "fp32"
    )
    assert not answer.ok
    assert "bias by distance" in answer.reason


@pytest.mark.parametrize("name", ["layer/gru", "layer/mlp"])
@pytest.mark.parametrize(
    "law",
    ["agreement", "streaming_equals_whole", "state_shapes", "flops_equal_formula", "two_training_steps", "purity"],
)
def test_diagonals_keep_the_laws(law: str, name: str) -> None:
    case = Case(METHOD, "diagonal", PARITY[name], SIZES.replace(num_layers=3), METHOD.modes)
    assert LAWS[law](case).status == HELD


@pytest.mark.parametrize("length", [4, 8, 12])
def test_diagonals_of_nothing_but_whole_blocks_equal_blocked(length: int) -> None:
    params, x = PARITY["layer/mlp"], tokens(length)
    plain, ours = (build(impl, params, num_layers=3) for impl in ("blocked", "diagonal"))
    ours.load_state_dict(plain.state_dict())
    torch.testing.assert_close(ours(x).y, plain(x).y)


def test_diagonals_need_a_state_in_every_layer() -> None:
    for impl in ("diagonal", "diagonal_triton"):
        answer = METHOD.impl_support(METHOD.impl(impl), "forward", SIZES, PARITY["bottom/gru"], "cuda", "fp32")
        assert not answer
    assert (
        "take the variant layer"
        in METHOD.impl_support(METHOD.impl("diagonal"), "forward", SIZES, PARITY["bottom/gru"], "cpu", "fp32").reason
    )
