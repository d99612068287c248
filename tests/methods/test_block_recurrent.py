"""Block-Recurrent Transformer: parity with the public package, a loop over tokens, streaming, states, counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations.block_recurrent import METHOD
from ctxbench.implementations.block_recurrent.params import BlockRecurrentParams, recurrent_layer
from ctxbench.method import Dims
from ctxbench.testing import laws_for, streamed
from ctxbench.workload import map_state, num_parameters, prepare, state_bytes, tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "block_recurrent.npz"
PARITY = {
    "few_states": BlockRecurrentParams(window=4, num_states=3),
    "many_states": BlockRecurrentParams(window=3, num_states=5),
}
FORMS = {
    "few_states": BlockRecurrentParams(window=5, num_states=2),
    "many_states": BlockRecurrentParams(window=4, num_states=9),
    "lstm": BlockRecurrentParams(window=4, num_states=3, gate="lstm"),
    "token_windows": BlockRecurrentParams(window=1, num_states=2),
    "one_window": BlockRecurrentParams(window=40, num_states=2),
}
LENGTH = 19
SIZES = Dims(seq_len=LENGTH, batch_size=2, d_model=8, num_heads=2, d_ff=12, num_layers=2, position="t5")
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


def build(impl: str, params: BlockRecurrentParams, **dims: int | str) -> torch.nn.Module:
    torch.manual_seed(0)
    module = METHOD.make(SIZES.replace(**dims), params, impl, "cpu", torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def tokens(length: int = LENGTH, batch: int = 2, d_model: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, d_model, generator=generator, dtype=torch.float64)


SAME = {  # our names of the package's parameters
    "q.weight": "to_q.weight",
    "o.weight": "to_out.weight",
    "read_q.weight": "states.q_to_state.weight",
    "state_q.weight": "states.state_to_q.weight",
    "write_q.weight": "states.q_from_state.weight",
    "norm_state.weight": "states.state_norm.gamma",
    "initial": "states.init_state",
    "identity": "states.state_pos_ids",
    "state_o.bias": "states.state_out_to_gate.bias",
}
SHARED = {("k", "v"): "to_kv.weight", ("state_k", "state_v"): "states.state_to_kv.weight"}  # one head there, H here
SCALES = {
    "scale": "attend",
    "read_scale": "states.to_state_cross_attn",
    "state_scale": "states.state_self_attn",
    "write_scale": "states.from_state_cross_attn",
}


@impls
@pytest.mark.parametrize("name", PARITY)
def test_outputs_and_gradients_equal_those_of_the_package(impl, name):
    golden = {
        key.removeprefix(f"{name}/"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(f"{name}/")
    }
    mixer, H, D = build(impl, PARITY[name], num_layers=1, position="none").layers[0].mixer, 2, 4
    out, gate = by_part(golden["states.to_state_out.weight"]), golden["states.state_out_to_gate.weight"]
    weights = {ours: golden[theirs] for ours, theirs in SAME.items()}
    for pair, theirs in SHARED.items():
        for ours, half in zip(pair, golden[theirs].chunk(2), strict=True):
            weights[f"{ours}.weight"] = half.repeat(H, 1)
    weights |= {ours: golden[f"{part}.q_scale"][:H] * D**-0.5 for ours, part in SCALES.items()}
    weights |= {
        "keep": -golden["states.learned_ema_beta"],
        "state_o.weight": gate @ out,
    }  # sigmoid(-b) = 1 - sigmoid(b)
    weights["norm_state.bias"] = torch.zeros(8, dtype=torch.float64)
    mixer.load_state_dict(weights)
    x = golden["x"].clone().requires_grad_()
    y = mixer(x).y
    y.backward(golden["grad"])

    grad = {key: parameter.grad for key, parameter in mixer.named_parameters()}
    found = {theirs: grad[ours] for ours, theirs in SAME.items()}
    for pair, theirs in SHARED.items():
        found[theirs] = torch.cat([grad[f"{ours}.weight"].view(H, D, 8).sum(dim=0) for ours in pair])
    found["states.learned_ema_beta"] = -grad["keep"]
    found["states.state_out_to_gate.weight"] = grad["state_o.weight"] @ out.T  # z = gate out [own; seen]
    found["states.to_state_out.weight"] = gate.T @ grad["state_o.weight"]
    golden["grad.states.to_state_out.weight"] = by_part(golden["grad.states.to_state_out.weight"])
    same(y, golden["y"])
    same(x.grad, golden["grad.x"])
    for theirs, value in found.items():
        same(value, golden[f"grad.{theirs}"])
    for ours, part in SCALES.items():
        same(grad[ours].sum(), golden[f"grad.{part}.q_scale"].sum() * D**0.5)
    assert len(found) + 2 * len(SCALES) == sum(key.startswith("grad.") for key in golden) - 1  # k_scale is q_scale's


def by_part(weight: torch.Tensor) -> torch.Tensor:
    """The package joins what states read of themselves and of tokens head by head, ours after merging heads."""
    return weight.view(8, 2, 2, 4).transpose(1, 2).reshape(8, 16)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * scale)


def oracle(layer: torch.nn.Module, x: torch.Tensor, params: BlockRecurrentParams) -> torch.Tensor:
    """The recurrent layer of one batch row, token by token and state by state, with the bias of T5."""
    mixer, normed, W = layer.mixer, layer.norm_mixer(x[0]), params.window
    H, D = mixer.num_heads, mixer.head_dim

    def unit(project, row, head):
        y = (project.weight @ row)[head * D : (head + 1) * D]
        return y / y.square().sum().sqrt()

    def attend(query, scale, keys, values, biases=None):
        scores = torch.stack([query @ key for key in keys]) * scale
        return (scores if biases is None else scores + torch.stack(biases)).softmax(0) @ torch.stack(values)

    vectors, rows = list(mixer.initial), []
    for i, token in enumerate(normed):
        named = [mixer.norm_state(s) + name for s, name in zip(vectors, mixer.identity, strict=True)]
        local, read = [], []
        for head in range(H):
            part = slice(head * D, (head + 1) * D)
            near = range(max(0, i - W + 1), i + 1)
            keys, values = [unit(mixer.k, normed[j], head) for j in near], [mixer.v(normed[j])[part] for j in near]
            biases = [
                mixer.position.table.weight[i - j, head] for j in near
            ]  # distances below 16 have rows of their own
            local.append(attend(unit(mixer.q, token, head), mixer.scale[head], keys, values, biases))
            keys, values = [unit(mixer.state_k, s, head) for s in named], [mixer.state_v(s)[part] for s in named]
            read.append(attend(unit(mixer.read_q, token, head), mixer.read_scale[head], keys, values))
        rows.append(mixer.o(torch.cat(local + read)))
        if (i + 1) % W == 0:
            after = []
            for r, name in enumerate(named):
                own, seen = [], []
                for head in range(H):
                    part = slice(head * D, (head + 1) * D)
                    keys, values = (
                        [unit(mixer.state_k, s, head) for s in named],
                        [mixer.state_v(s)[part] for s in named],
                    )
                    own.append(attend(unit(mixer.state_q, name, head), mixer.state_scale[head], keys, values))
                    both = range(max(0, i + 1 - 2 * W), i + 1)
                    keys = [unit(mixer.k, normed[j], head) for j in both]
                    values = [mixer.v(normed[j])[part] for j in both]
                    seen.append(attend(unit(mixer.write_q, name, head), mixer.write_scale[head], keys, values))
                new = mixer.state_o(torch.cat(own + seen))
                if params.gate == "fixed":
                    keep = torch.sigmoid(mixer.keep)
                    after.append(keep * vectors[r] + (1 - keep) * new)
                else:
                    forget, take = torch.sigmoid(mixer.forget(new) + 1), torch.sigmoid(mixer.take(new) - 1)
                    after.append(forget * vectors[r] + take * new)
            vectors = after
    x = x[0] + torch.stack(rows)
    return (x + layer.ffn(layer.norm_ffn(x)))[None]


@pytest.mark.parametrize("name", ["few_states", "lstm"])
def test_reference_equals_a_loop_over_tokens_and_states(name):
    params, x = FORMS[name], tokens(10, batch=1)
    module, again = (build("reference", params, num_layers=1) for _ in range(2))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(mine).y, oracle(again.layers[0], theirs, params)
    same(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    same(mine.grad, theirs.grad)
    for ours, oracles in zip(module.parameters(), again.parameters(), strict=True):
        same(ours.grad, oracles.grad)


@forms
@pytest.mark.parametrize("length", [1, LENGTH])
def test_blocked_equals_reference_with_all_gradients(params, length):
    compare(params, length, "t5")


@pytest.mark.parametrize("position", ["t5", "none", "alibi"])
def test_blocked_equals_reference_over_several_blocks(position):
    compare(BlockRecurrentParams(window=140, num_states=3), 301, position)


def compare(params: BlockRecurrentParams, length: int, position: str) -> None:
    results = []
    for impl in ("reference", "blocked"):
        module, x = build(impl, params, position=position), tokens(length).requires_grad_()
        y = module(x).y
        with torch.no_grad():
            same(module(x).y, y)
        y.backward(torch.ones_like(y) + x.detach())
        zero = torch.zeros(())
        results.append([y, x.grad, *(zero if p.grad is None else p.grad for p in module.parameters())])
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-9 * max(1.0, float(reference.abs().max())))


@impls
@forms
def test_streaming_equals_the_whole_sequence_for_any_cut(impl, params):
    module, x = build(impl, params), tokens()
    with torch.no_grad():
        whole = module(x).y
        for sizes in ([3, 1, 1, 7, 7], [4, 12, 3], [1] * LENGTH):
            torch.testing.assert_close(streamed(module, x, sizes).y, whole, rtol=0, atol=1e-12)


@forms
def test_state_has_the_declared_size_after_every_token_and_is_a_value(params):
    module, x = build("blocked", params), tokens()
    formula = METHOD.cost_of("blocked", "stream", True, "t5", params).state_bytes
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


def test_states_reach_beyond_every_window():
    params = BlockRecurrentParams(window=2, num_states=2)
    module, x = build("blocked", params, num_layers=1), tokens(12, batch=1).requires_grad_()
    y = module(x).y
    (first,) = torch.autograd.grad(y[:, -1].sum(), x)
    assert first.abs().amin(dim=(0, 2)).gt(0).all()


def test_only_the_third_layer_from_the_top_has_states():
    assert [recurrent_layer(n) for n in (1, 2, 3, 4, 12)] == [0, 0, 0, 1, 9]
    module = build("blocked", FORMS["few_states"], num_layers=5)
    assert [hasattr(layer.mixer, "initial") for layer in module.layers] == [i == 2 for i in range(5)]


def test_the_other_gate_keeps_the_laws():
    names = ("causality", "receptive_field", "batch_independence", "streaming_equals_whole", "state_shapes", "purity")
    names += ("gradients_reach_everything", "gradcheck", "two_training_steps")
    asked = 0
    for law, case in laws_for(METHOD):
        if str(law) in names and case.label == "" and case.impl == "blocked":
            chosen = dataclasses.replace(case, params=FORMS["lstm"], dims=case.dims.replace(seq_len=11))
            finding = law(chosen)
            assert finding.status == "held", finding
            asked += 1
    assert asked == len(names)


COUNTED = {**{name: (params, LENGTH) for name, params in FORMS.items()}, "blocks": (BlockRecurrentParams(150, 9), 331)}


@pytest.mark.parametrize("mode", METHOD.modes)
@impls
@pytest.mark.parametrize("name", COUNTED)
def test_formulas_equal_what_is_counted(name, impl, mode):
    params, most = COUNTED[name]
    formula = METHOD.cost_of(impl, mode, True, "t5", params)
    for length, layers in ((3, 1), (most, 4)):
        dims = SIZES.replace(seq_len=length, num_layers=layers)
        work, values = prepare(METHOD, dims, params, impl, mode, "fp32"), bindings(dims, params, 4, params.window)
        with Meter() as meter:
            work.call()
        assert evaluate(total(formula.flops), values) == meter.result().flops
        assert evaluate(formula.num_parameters, values) == num_parameters(work.module)
        assert not meter.result().uncounted


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("layers", [1, 3])
def test_peak_formula_is_within_three_percent_in_any_depth(mode, layers):
    dims = Dims(seq_len=4133, d_model=128, num_layers=layers, d_ff=512, position="t5")
    values = bindings(dims, BlockRecurrentParams(), 4, 512)
    formula = evaluate(METHOD.cost_of("reference", mode, True, "t5", BlockRecurrentParams()).peak_bytes, values)
    assert formula == pytest.approx(trace(METHOD, dims, BlockRecurrentParams(), "reference", mode).peak_bytes, rel=0.03)
