"""Segment-recurrent transformer: a loop written from its equations, streams, cuts, the diagonal, and the sketch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ctxbench.cell import Cell
from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations.segment_recurrent import METHOD
from ctxbench.implementations.segment_recurrent.as_written import SketchLayer, SketchStack
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.measure.gate import run_gate
from ctxbench.method import Dims
from ctxbench.testing import HELD, laws_for, streamed
from ctxbench.workload import prepare, state_bytes, tensors

IMPLS = ("reference", "blocked", "diagonal")
FORMS = {
    "usual": SegmentRecurrentParams(memory_len=7, segment_len=4),
    "short_memory": SegmentRecurrentParams(memory_len=2, segment_len=4),
    "one_item": SegmentRecurrentParams(memory_len=1, segment_len=3),
    "long_memory": SegmentRecurrentParams(memory_len=21, segment_len=3),  # a segment has fewer than it may add
    "one_token_segments": SegmentRecurrentParams(memory_len=5, segment_len=1),
    "cut": SegmentRecurrentParams(memory_len=4, segment_len=4, bptt_depth=1),
}
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", IMPLS)
LENGTH = 13
SIZES = Dims(seq_len=LENGTH, batch_size=2, d_model=6, num_heads=2, d_ff=8, num_layers=3)


def make(impl="reference", params=FORMS["usual"], **dims):
    torch.manual_seed(0)
    return METHOD.make(SIZES.replace(**dims), params, impl, "cpu", torch.float64)


def tokens(length=LENGTH, batch=2, d_model=6, seed=1):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


stream = torch.no_grad()(streamed)


def results(module, x, grad):
    x = x.clone().requires_grad_()
    y = module(x).y
    y.backward(grad)
    named = module.named_parameters()
    return {"y": y.detach(), "x": x.grad, **{n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}}


# The equations, one token and one head at a time.


def affine(linear, x):
    return linear.weight @ x + linear.bias


def norm(layer_norm, x):
    centred = x - x.mean()
    return layer_norm.weight * centred / (centred.square().mean() + layer_norm.eps).sqrt() + layer_norm.bias


def turned(vector, place):
    """Channels n and n + D/2 as a complex number, turned by ``place * 10000^(-2 n / D)``."""
    half = len(vector) // 2
    angles = place * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat((number.real, number.imag))


def added(layer, position, head, away):
    """To the score of a key ``away`` places before its query, of two heads: from the equations of T5 and ALiBi."""
    if position == "alibi":
        return -(2.0 ** (-4 * (head + 1))) * away
    if position != "t5":
        return 0.0
    bucket = away if away < 16 else min(31, 16 + int(math.log(away / 16) / math.log(128 / 16) * 16))
    return layer.position.table.weight[bucket, head]


def attend(layer, q, keys, values, own_place, places, position):
    """``places`` of the query, and of every key."""
    parts, width = [], len(q) // layer.num_heads
    for head in range(layer.num_heads):
        own = slice(head * width, (head + 1) * width)
        query, seen = q[own], [key[own] for key in keys]
        if position == "rope":
            query = turned(query, own_place)
            seen = [turned(key, place) for key, place in zip(seen, places, strict=True)]
        biases = [added(layer, position, head, own_place - place) for place in places]
        scores = [query @ key / math.sqrt(width) + bias for key, bias in zip(seen, biases, strict=True)]
        weights = [torch.exp(score) for score in scores]
        parts.append(sum(w * value[own] for w, value in zip(weights, values, strict=True)) / sum(weights))
    return torch.cat(parts)


def loop_layer(layer, x, params, position="none"):
    memory, outputs = [], []
    for number, begin in enumerate(range(0, len(x), params.segment_len)):
        if params.bptt_depth >= 0 and number and number % (params.bptt_depth + 1) == 0:
            memory = [item.detach() for item in memory]
        segment = list(x[begin : begin + params.segment_len])
        for i, token in enumerate(segment):
            seen = [*memory, *segment[: i + 1]]
            items = range(-len(memory), 0)
            keys, values = ([affine(project, row) for row in seen] for project in (layer.k, layer.v))
            mixed = attend(layer, affine(layer.q, token), keys, values, i, [*items, *range(i + 1)], position)
            y = norm(layer.norm_self, token + affine(layer.o, mixed))
            if memory:
                keys, values = ([affine(project, row) for row in memory] for project in (layer.read_k, layer.read_v))
                mixed = attend(layer, affine(layer.read_q, y), keys, values, i, items, position)
                y = y + affine(layer.read_o, mixed)
            y = norm(layer.norm_read, y)
            if layer.ffn is not None:
                hidden = torch.nn.functional.gelu(affine(layer.ffn.up, y))
                y = norm(layer.norm_ffn, y + affine(layer.ffn.down, hidden))
            outputs.append(y)
        mean = sum(memory) / len(memory) if memory else torch.zeros_like(x[0])
        for y in outputs[begin:][-math.ceil(params.memory_len / 4) :]:
            gate = torch.sigmoid(affine(layer.gate, y))
            memory = [*memory, gate * y + (1 - gate) * mean]
        memory = memory[-params.memory_len :]
    return torch.stack(outputs)


@forms
@pytest.mark.parametrize(("d_ff", "position"), [(8, "none"), (0, "none"), (8, "rope"), (8, "t5"), (0, "alibi")])
def test_outputs_and_gradients_equal_a_loop_over_tokens_heads_and_keys(params, d_ff, position):
    x, grad = (tokens(9, batch=1, d_model=8, seed=seed) for seed in (1, 2))
    sizes, found = {"d_model": 8, "d_ff": d_ff, "num_layers": 2, "position": position}, {}
    impls = (*IMPLS, "slabs")
    for impl in ("loop", *impls):
        module, own = make("reference" if impl == "loop" else impl, params, **sizes), x.clone()
        own.requires_grad_()
        if impl == "loop":
            (y,) = own
            for layer in module.layers:
                y = loop_layer(layer, y, params, position)
            y = y[None]
        else:
            y = module(own).y
        y.backward(grad)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        found[impl] = [y.detach(), own.grad, *gradients]
    assert len(found["loop"]) == 2 + 2 * (22 + 6 * (d_ff > 0)) + (position == "t5")
    for impl in impls:
        for mine, expected in zip(found[impl], found["loop"], strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-11)


@forms
@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("length", [1, 4, 5, 21])
def test_other_impls_equal_reference_in_outputs_and_gradients(impl, params, length):
    slow, fast = (results(make(name, params), tokens(length), tokens(length, seed=2)) for name in ("reference", impl))
    for key, value in slow.items():
        torch.testing.assert_close(fast[key], value, rtol=0, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


# State.


@impls
@forms
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [4, 4, 4, 1], [3, 2, 7, 1], [8, 5]], ids=str)
@pytest.mark.parametrize("position", ["none", "rope", "t5"])
def test_calls_may_end_anywhere_in_a_segment(impl, params, sizes, position):
    module, x = make(impl, params, d_model=8, position=position), tokens(d_model=8)
    y, _ = stream(module, x, sizes)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x).y, rtol=0, atol=1e-12)


@forms
def test_impls_hand_their_states_to_one_another(params):
    x = tokens(15)
    with torch.no_grad():
        whole, state, outputs = make(params=params)(x).y, make(params=params).init_state(2), []
        for impl, part in zip(IMPLS, x.split(5, dim=1), strict=True):
            y, state = make(impl, params)(part, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-12)


@impls
@forms
def test_state_bytes_follow_the_formula_at_every_length_and_memory_is_bounded(impl, params):
    module, cost = make(impl, params), METHOD.cost_of(impl, "stream", True, "none", params)
    state = module.init_state(2)
    for length in range(1, 24):
        with torch.no_grad():
            state = module(tokens(1, seed=length), state).state
        values = bindings(SIZES.replace(seq_len=length), params, 8, params.segment_len)
        assert state_bytes(state) == evaluate(cost.state_bytes, values)
        kept = min(params.memory_len, length // params.segment_len * params.added)
        assert [one.memory.shape[1] for one in state] == [kept] * 3


def test_an_item_lies_between_its_output_and_the_mean_of_the_memory():
    module = make(num_layers=1, params=SegmentRecurrentParams(memory_len=8, segment_len=4))
    (layer,) = module.layers
    outputs, state = stream(module, tokens(8), [4, 4])
    _, before = stream(module, tokens(8)[:, :4], [4])
    with torch.no_grad():
        gate = torch.sigmoid(layer.gate(outputs[:, -2:]))
        mean = before[0].memory.mean(dim=1, keepdim=True)
    expected = torch.cat((before[0].memory, gate * outputs[:, -2:] + (1 - gate) * mean), dim=1)
    torch.testing.assert_close(state[0].memory, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", [*IMPLS, "as_written"])
def test_the_gate_before_every_timing_lets_it_pass(impl, mode):
    if METHOD.impl(impl).modes and mode not in METHOD.impl(impl).modes:
        pytest.skip("the sketch would take a token for a segment")
    cell = Cell(
        method=METHOD.name, impl=impl, mode=mode, seq_len=101, d_model=16, num_heads=2, d_ff=16, num_layers=2,
        params={"segment_len": 16, "memory_len": 8},
    )  # fmt: skip
    gate = run_gate(METHOD, cell)
    assert gate.ok, gate.message


# Gradients through memory.


@impls
@pytest.mark.parametrize("depth", [-1, 0, 1, 2])
def test_a_gradient_passes_as_many_boundaries_as_it_may(impl, depth):
    module = make(impl, SegmentRecurrentParams(memory_len=4, segment_len=2, bptt_depth=depth))
    for segment in range(6):
        x = tokens(12).requires_grad_()
        module(x).y[:, 2 * segment, 0].sum().backward()
        reached = [bool(x.grad[:, 2 * s : 2 * s + 2].any()) for s in range(6)]
        first = 0 if depth < 0 else segment - segment % (depth + 1)
        assert reached == [first <= s <= segment for s in range(6)]
        assert segment - first <= depth or depth < 0


@impls
def test_the_gate_is_trained_unless_every_boundary_is_cut(impl):
    for depth in (-1, 1, 0):
        module = make(impl, FORMS["usual"].replace(bptt_depth=depth))
        gradients = results(module, tokens(), tokens(seed=2))
        assert bool(gradients["layers.0.gate.weight"].any()) == (depth != 0)


@impls
def test_gradients_never_cross_a_call_so_that_training_on_a_stream_goes_on(impl):
    module = make(impl)
    state = module.init_state(2)
    for step in range(3):
        y, state = module(tokens(6, seed=step), state)
        y[:, :, 0].sum().backward()
        assert not any(tensor.requires_grad for tensor in tensors(state))


# The diagonal.


def steps(module, length):
    """How many times any cell, or group of cells, was computed."""
    calls = []
    for layer in module.layers:
        own = layer.piece
        layer.piece = lambda *args, own=own: calls.append("alone") or own(*args)
    if hasattr(module, "together"):
        own_together = module.together
        module.together = lambda *args: calls.append(len(args[2])) or own_together(*args)
    with torch.no_grad():
        module(tokens(length))
    return calls


def test_the_diagonal_computes_cells_of_equal_shape_together():
    params = SegmentRecurrentParams(memory_len=2, segment_len=4)
    assert steps(make("blocked", params), 40) == ["alone"] * 30
    together = [call for call in steps(make("diagonal", params), 40) if call != "alone"]
    assert together == [2, 3, 3, 3, 3, 3, 3, 2]  # segments 2 to 9 have a full memory
    for impl, depth in (("blocked", 30), ("diagonal", 12)):
        cost = METHOD.cost_of(impl, "forward", True, "none", params)
        assert evaluate(cost.depth, bindings(SIZES.replace(seq_len=40), params, 4, 4)) == depth


# Laws and formulas of other forms.

LAWS = {
    "cut": {"flops_equal_formula": IMPLS, "receptive_field": IMPLS, "state_shapes": ("diagonal",)},
}


@pytest.mark.parametrize(
    ("law", "case"),
    [
        pytest.param(
            law, replace(case, params=FORMS[name], modes=("forward", "train", "stream")), id=f"{law}-{case}-{name}"
        )
        for name, laws in LAWS.items()
        for law, case in laws_for(METHOD)
        if not case.label and case.impl in laws.get(str(law), ())
    ],
)
def test_laws_of_forms(law, case):
    assert law(case).status == HELD


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("name", ["long_memory", "one_token_segments"])
def test_counts_hold_for_other_ratios_of_memory_and_segment(name, mode):
    dims, params = SIZES.replace(seq_len=23), FORMS[name]
    for impl in ("reference", "blocked"):
        work = prepare(METHOD, dims, params, impl, mode, "fp32")
        with Meter() as meter:
            work.call()
        cost = METHOD.cost_of(impl, mode, True, "none", params)
        values = bindings(dims, params, 4, params.segment_len)
        assert evaluate(total(cost.flops), values) == meter.result().flops


@pytest.mark.parametrize(
    ("impl", "mode", "memory_len"),
    [(impl, mode, 256) for impl in ("reference", "blocked") for mode in METHOD.modes]
    + [("blocked", mode, 600) for mode in ("forward", "train")],  # longer than a segment: a mask
)
def test_formulas_hold_in_bf16_with_several_layers_and_an_unfinished_segment(impl, mode, memory_len):
    dims = Dims(seq_len=4200, d_model=64, num_heads=4, num_layers=2, d_ff=256)
    params = SegmentRecurrentParams(memory_len=memory_len)
    cost, seen = METHOD.cost_of(impl, mode, True, "none", params), trace(METHOD, dims, params, impl, mode, "bf16")
    values = bindings(dims, params, 2, 512)
    assert evaluate(total(cost.flops), values) == seen.flops
    assert seen.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)


def test_cost_grows_linearly_and_a_stream_needs_the_same_memory_at_any_length():
    params = METHOD.params()
    for impl in ("reference", "blocked", "diagonal", "as_written"):
        assert big_o(total(METHOD.cost_of(impl, "forward", True, "none", params).flops)) == "O(T)"
    assert big_o(METHOD.cost_of("blocked", "stream", True, "none", params).peak_bytes) == "O(1)"
    peaks = {trace(METHOD, Dims(seq_len=n), params, "blocked", "stream").peak_bytes for n in (3072, 4096)}
    assert len(peaks) == 1


@pytest.mark.parametrize("name", ["memory_len", "segment_len"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, received 0"):
        SegmentRecurrentParams(**{name: 0})


# The sketch.


def sketch(batch_first=True, **dims):
    torch.manual_seed(0)
    return SketchStack(SIZES.replace(**dims), FORMS["usual"], batch_first).double()


def test_the_sketch_as_it_stands_attends_over_the_batch_and_fails_in_its_second_segment():
    module, x = sketch(batch_first=False, num_layers=1), tokens(4)
    other = x.clone()
    other[0, 2] += tokens(1, batch=1)[0, 0]
    with torch.no_grad():
        moved = (module(x).y - module(other).y).abs().amax(dim=2) > 1e-9
    assert moved.nonzero().tolist() == [[0, 2], [1, 2]]  # no other token, but the other row of the batch
    with pytest.raises((RuntimeError, AssertionError)):
        module(tokens(5))


def test_the_sketch_sees_later_tokens_of_a_segment():
    module, x = sketch(num_layers=1), tokens(4)
    other = x.clone()
    other[:, 3] += tokens(1)[:, 0]
    with torch.no_grad():
        assert (module(x).y - module(other).y)[:, 0].abs().max() > 1e-3


def test_the_sketch_computes_its_gate_and_forgets_it():
    module = sketch()
    module(tokens()).y[:, :, 0].sum().backward()
    silent = {name.rpartition(".")[0] for name, parameter in module.named_parameters() if parameter.grad is None}
    assert silent == {f"layers.{layer}.memory_gate" for layer in range(3)}
    with torch.no_grad():
        y = module(tokens(4)).y
        assert torch.equal(module.memory_states[2], y[:, -2:])  # the bare outputs


def test_the_sketch_cannot_train_twice_on_the_memory_it_keeps():
    module = sketch()
    state = module.init_state(2)
    module(tokens(4), state).y[:, :, 0].sum().backward()
    assert all(memory.requires_grad for memory in module.memory_states)
    with pytest.raises(RuntimeError, match="second time"):
        module(tokens(4), state).y[:, :, 0].sum().backward()


def test_the_sketch_uses_its_second_norm_and_cross_attention_only_where_there_is_a_memory():
    module = sketch(num_layers=1)
    module(tokens(4)).y[:, :, 0].sum().backward()
    silent = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert {"layers.0.norm2.weight", "layers.0.cross_attention.in_proj_weight"} <= silent


def test_a_quarter_of_the_memory_is_rounded_up():
    layer = SketchLayer(SIZES, SegmentRecurrentParams(memory_len=10), batch_first=True).double()
    assert layer.update_memory(tokens(8), None).shape[1] == SegmentRecurrentParams(memory_len=10).added == 3


def test_the_sketch_states_are_as_long_as_streamed_ones():
    for context in (3, 4, 9, 17):
        streamed = stream(sketch(), tokens(context), [4] * (context // 4) + [context % 4] * (context % 4 > 0))[1]
        declared = sketch().state_at(2, context)
        assert [one.shape for one in streamed] == [one.shape for one in declared]
