"""Recurrent memory transformer: parity with GPT-2 between memory tokens, a loop, streams, cut gradients, counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cell import Cell
from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.rmt import METHOD
from ctxbench.implementations.rmt.layer import Rows
from ctxbench.implementations.rmt.params import RMTParams
from ctxbench.implementations.rmt.reference import visible
from ctxbench.measure.gate import run_gate
from ctxbench.method import Dims
from ctxbench.testing import HELD, laws_for, streamed
from ctxbench.workload import state_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "rmt.npz"
PARITY = {
    "hf": RMTParams(num_memory=3, segment_len=4),
    "hf_cut": RMTParams(num_memory=2, segment_len=3, bptt_depth=1),
    "xl_cut": RMTParams(num_memory=2, segment_len=3, bptt_depth=0, variant="xl"),
}
FORMS = {
    "hf": RMTParams(num_memory=3, segment_len=4),
    "xl": RMTParams(num_memory=3, segment_len=4, variant="xl"),
    "one_token_segments": RMTParams(num_memory=2, segment_len=1, variant="xl"),
    "more_memory_than_tokens": RMTParams(num_memory=5, segment_len=2),
    "one_memory_token": RMTParams(num_memory=1, segment_len=5, variant="xl"),
}
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])
biases = pytest.mark.parametrize("position", ["t5", "alibi"])
LENGTH = 13


def make(impl="reference", params=FORMS["hf"], dtype=torch.float64, **dims):
    torch.manual_seed(0)
    sizes = Dims(**{"seq_len": LENGTH, "d_model": 6, "num_heads": 2, "d_ff": 8, "num_layers": 2, **dims})
    return METHOD.make(sizes, params, impl, "cpu", dtype)


def tokens(length=LENGTH, batch=2, d_model=6, seed=1):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


stream = torch.no_grad()(streamed)


def results(module, x, grad):
    x = x.clone().requires_grad_()
    y = module(x).y
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@impls
@pytest.mark.parametrize("name", PARITY)
def test_outputs_and_gradients_equal_those_of_gpt2_between_memory_tokens(impl, name):
    golden = {
        key.removeprefix(f"{name}/"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(f"{name}/")
    }
    module = make(impl, PARITY[name])
    module.load_state_dict({key: golden[key] for key in module.state_dict()})
    found = results(module, golden["x"], golden["grad"])
    assert len(found) == 2 + 1 + 2 + 2 * 16
    for key, value in found.items():
        expected = golden["y" if key == "y" else f"grad.{key}"]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


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


def by_distance(position, table, head, away):
    """What is added to the score of a key ``away`` rows before its query, of two heads: from the papers' equations."""
    if position == "alibi":
        return -(2.0 ** (-4 * (head + 1))) * abs(away)
    if position != "t5":
        return 0.0
    away = max(away, 0)
    bucket = away if away < 16 else min(31, 16 + int(math.log(away / 16) / math.log(128 / 16) * 16))
    return table[bucket, head]


def loop(module, x, params, position="none"):
    """One batch row, ``x: [T, d_model]``: every query against every key it sees, one head at a time."""
    m, memory, outputs = params.num_memory, list(module.memory), []
    width, table = module.head_dim, getattr(getattr(module.layers[0].position, "table", None), "weight", None)
    for begin in range(0, len(x), params.segment_len):
        own = list(x[begin : begin + params.segment_len])
        rows = [*memory, *own, *memory]
        for layer in module.layers:
            normed = [norm(layer.norm_mixer, row) for row in rows]
            q, k, v = ([affine(project, row) for row in normed] for project in (layer.q, layer.k, layer.v))
            mixed = []
            for i in range(len(rows)):
                seen = i + 1
                if params.variant == "xl":
                    seen = m if i < m else len(rows) if i >= len(rows) - m else i + 1
                heads = []
                for head, part in enumerate((slice(0, width), slice(width, 2 * width))):
                    query, keys = q[i][part], [key[part] for key in k[:seen]]
                    if position == "rope":
                        query, keys = turned(query, i), [turned(key, j) for j, key in enumerate(keys)]
                    scores = [query @ key / math.sqrt(width) for key in keys]
                    added = [by_distance(position, table, head, i - j) for j in range(seen)]
                    weights = [torch.exp(score + bias) for score, bias in zip(scores, added, strict=True)]
                    heads.append(sum(w * v[j][part] for j, w in enumerate(weights)) / sum(weights))
                mixed.append(rows[i] + affine(layer.o, torch.cat(heads)))
            rows = [
                r + affine(layer.ffn.down, torch.nn.functional.gelu(affine(layer.ffn.up, norm(layer.norm_ffn, r))))
                for r in mixed
            ]
        rows = [norm(module.norm, row) for row in rows]
        outputs += rows[m : m + len(own)]
        memory = rows[m + len(own) :]
    return torch.stack(outputs)


@impls
@forms
def test_outputs_equal_a_loop_over_segments_queries_and_keys(impl, params):
    module, x = make(impl, params), tokens(7)
    with torch.no_grad():
        expected = torch.stack([loop(module, row, params) for row in x])
        torch.testing.assert_close(module(x).y, expected, rtol=0, atol=1e-12)


@impls
@forms
def test_rotations_number_the_rows_of_a_segment_memory_tokens_included(impl, params):
    module, x = make(impl, params, d_model=8, position="rope"), tokens(7, d_model=8)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(own).y, torch.stack([loop(module, row, params, "rope") for row in other])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for result in (y, expected):
        (result * x.cos()).sum().backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=1e-11)
    for sizes in ([1] * 7, [3, 2, 2]):
        torch.testing.assert_close(stream(module, x, sizes)[0], expected.detach(), rtol=0, atol=1e-12)


@impls
@biases
@forms
def test_biases_take_distances_between_rows_of_a_segment_memory_tokens_included(impl, position, params):
    module, x = make(impl, params, position=position), tokens(7)
    if position == "t5":
        torch.nn.init.normal_(module.layers[0].position.table.weight)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(own).y, torch.stack([loop(module, row, params, position) for row in other])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found = []
    for result, given in ((y, own), (expected, other)):
        module.zero_grad()
        (result * x.cos()).sum().backward()
        found.append([given.grad, *(p.grad.clone() for p in module.parameters())])
    assert len(found[0]) == 1 + 3 + 2 * 16 + (position == "t5")
    for one, another in zip(*found, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=1e-11)
    for sizes in ([1] * 7, [3, 2, 2]):
        torch.testing.assert_close(stream(module, x, sizes)[0], expected.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["blocked", "native"])
@biases
@pytest.mark.parametrize("variant", ["hf", "xl"])
def test_biases_in_long_segments_and_in_calls_that_end_anywhere(impl, position, variant):
    """Several slabs of queries, distances beyond T5's last bucket, and ranges of keys that begin elsewhere."""
    params = RMTParams(num_memory=5, segment_len=150, variant=variant)
    slow, fast = (make(name, params, seq_len=320, position=position) for name in ("reference", impl))
    if position == "t5":
        for module in (slow, fast):
            torch.nn.init.normal_(module.layers[0].position.table.weight, generator=torch.Generator().manual_seed(3))
    x = tokens(320)
    with torch.no_grad():
        expected = slow(x).y
        torch.testing.assert_close(fast(x).y, expected, rtol=0, atol=1e-12)
    for sizes in ([150, 150, 20], [1, 140, 30, 148, 1]):
        torch.testing.assert_close(stream(fast, x, sizes)[0], expected, rtol=0, atol=1e-12)


def test_a_written_out_row_of_the_two_biases():
    """One query and its keys by hand: T5's buckets of 0, 15, 16 and 200 rows, ALiBi's two slopes."""
    far = [by_distance("t5", torch.arange(64.0).view(32, 2), 1, away) for away in (-3, 0, 15, 16, 200)]
    assert far == [1, 1, 31, 33, 63]
    assert [by_distance("alibi", None, head, 16) for head in (0, 1)] == [-1, -1 / 16]


@pytest.mark.parametrize(("position", "variant"), [("alibi", "hf"), ("t5", "xl")])
def test_formulas_of_biases_are_what_is_counted_where_every_corner_has_several_slabs(position, variant):
    params = RMTParams(num_memory=150, segment_len=300, variant=variant)
    for mode in METHOD.modes:
        for impl in ("blocked", *["native"] * (mode in ("forward", "stream"))):
            cost = METHOD.cost_of(impl, mode, True, position, params)
            for length in (299, 300, 721) if mode == "decode" else (721,):
                dims = Dims(length, batch_size=2, d_model=16, num_layers=2, d_ff=32, position=position)
                seen, values = trace(METHOD, dims, params, impl, mode, "fp32"), bindings(dims, params, 4, 300)
                assert evaluate(total(cost.flops), values) == seen.flops
                assert not seen.uncounted
                assert impl == "blocked" or evaluate(cost.peak_bytes, values) == pytest.approx(
                    seen.peak_bytes, rel=0.01
                )


@forms
@pytest.mark.parametrize("d_ff", [8, 0])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 13])
def test_blocked_equals_reference_in_outputs_and_gradients(params, d_ff, length):
    pair = [make(impl, params, d_ff=d_ff, num_layers=3) for impl in ("reference", "blocked")]
    slow, fast = (results(module, tokens(length), tokens(length, seed=2)) for module in pair)
    for key, value in slow.items():
        torch.testing.assert_close(fast[key], value, rtol=0, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("reads", "writes", "keys"), [(2, 0, 5), (2, 2, 7), (0, 2, 9), (0, 0, 6)])
def test_full_mask_opens_the_two_corners_of_the_causal_one(reads, writes, keys):
    rows = Rows(reads, 3, writes)
    causal, full = (visible(rows, keys, form, torch.device("cpu")) for form in (False, True))
    opened = (full & ~causal).nonzero().tolist()
    n, first = sum(rows), keys - sum(rows)
    corners = [range(reads), range(n - writes, n)]
    assert opened == [[i, first + j] for corner in corners for i in corner for j in corner if j > i]
    assert not (causal & ~full).any()


# State.


@impls
@forms
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [4, 4, 4, 1], [3, 2, 7, 1], [LENGTH]], ids=str)
def test_calls_may_end_anywhere_in_a_segment(impl, params, sizes):
    module, x = make(impl, params), tokens()
    y, _ = stream(module, x, sizes)
    with torch.no_grad():
        torch.testing.assert_close(y, module(x).y, rtol=0, atol=1e-12)


@forms
def test_impls_hand_their_states_to_one_another(params):
    slow, fast = (make(impl, params) for impl in ("reference", "blocked"))
    x = tokens()
    with torch.no_grad():
        first = slow(x[:, :6], slow.init_state(2))
        rest = fast(x[:, 6:], first.state).y
        torch.testing.assert_close(torch.cat((first.y, rest), dim=1), slow(x).y, rtol=0, atol=1e-12)


@impls
def test_state_is_memory_between_segments_and_keys_inside_one(impl):
    params = FORMS["hf"]
    module, cost = make(impl, params), METHOD.cost_of(impl, "stream", True, "none", params)
    state, seen = module.init_state(2), []
    for length in range(1, 10):
        with torch.no_grad():
            state = module(tokens(1, seed=length), state).state
        values = bindings(Dims(seq_len=length, batch_size=2, d_model=6, num_layers=2, num_heads=2), params, 8, 4)
        assert state_bytes(state) == evaluate(cost.state_bytes, values)
        seen.append([cache.k.shape[2] for cache in state.caches])
    assert seen == [[n, n] for n in (4, 5, 6, 0, 4, 5, 6, 0, 4)]


def test_memory_is_what_the_write_tokens_became_and_starts_as_the_parameter():
    module, x = make("blocked"), tokens(4)
    start = module.init_state(2)
    assert torch.equal(start.memory, module.memory.expand(2, -1, -1))
    with torch.no_grad():
        rows = torch.cat((start.memory, x, start.memory), dim=1)
        for layer in module.layers:
            rows, _ = layer(rows, None, Rows(3, 4, 3), unread=0)
        torch.testing.assert_close(module(x, start).state.memory, module.norm(rows)[:, -3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("variant", "position"), [("hf", "none"), ("xl", "none"), ("xl", "rope")])
def test_a_repeated_row_of_memory_parts_under_a_causal_mask_or_by_positions(variant, position):
    """Otherwise nothing tells equal memory tokens that see each other fully apart: see the deviations."""
    module = make("reference", FORMS[variant], d_model=8, position=position)
    with torch.no_grad():
        module.memory.copy_(module.memory[:1].expand_as(module.memory))
        spread = stream(module, tokens(12, d_model=8), [4, 4, 4])[1].memory.std(dim=1).max()
    assert spread < 1e-12 if (variant, position) == ("xl", "none") else spread > 1e-3


@pytest.mark.parametrize("mode", METHOD.modes)
@impls
def test_the_gate_before_every_timing_lets_it_pass(impl, mode):
    cell = Cell(
        method=METHOD.name, impl=impl, mode=mode, seq_len=101, d_model=16, num_heads=2, d_ff=16, num_layers=2,
        params={"segment_len": 16, "num_memory": 4},
    )  # fmt: skip
    gate = run_gate(METHOD, cell)
    assert gate.ok, gate.message


# Gradients through memory.


@impls
@pytest.mark.parametrize("depth", [-1, 0, 1, 2])
def test_a_gradient_passes_as_many_boundaries_as_it_may(impl, depth):
    module = make(impl, RMTParams(num_memory=2, segment_len=2, bptt_depth=depth))
    for segment in range(6):
        x = tokens(12).requires_grad_()
        module(x).y[:, 2 * segment][:, 0].sum().backward()
        reached = [bool(x.grad[:, 2 * s : 2 * s + 2].any()) for s in range(6)]
        first = 0 if depth < 0 else segment - segment % (depth + 1)
        assert reached == [first <= s <= segment for s in range(6)]
        assert segment - first <= depth or depth < 0


@impls
def test_a_cut_leaves_the_initial_memory_to_the_first_chain(impl):
    module = make(impl, RMTParams(num_memory=2, segment_len=2, bptt_depth=0))
    module(tokens(6)).y[:, 2:, 0].sum().backward()
    assert module.memory.grad is None or not module.memory.grad.any()
    module(tokens(6)).y[:, :2, 0].sum().backward()
    assert module.memory.grad.any()


@impls
def test_gradients_never_cross_a_call_so_that_training_on_a_stream_goes_on(impl):
    module = make(impl)
    state = module.init_state(2)
    for step in range(3):
        x = tokens(3, seed=step).requires_grad_()
        y, state = module(x, state)
        y[:, :, 0].sum().backward()  # all channels together are a constant after the norm
        assert not any(t.requires_grad for t in (state.memory, *(cache.k for cache in state.caches)))


# Laws and formulas of the other variant.

VARIANTS = {
    "xl": {"variant": "xl"},
    "cut": {"bptt_depth": 1},
}
LAWS = (
    "agreement", "causality", "receptive_field", "streaming_equals_whole", "state_shapes", "flops_equal_formula",
    "state_bytes_equal_formula", "batch_independence", "algorithmic_flops_agree",
)  # fmt: skip


@pytest.mark.parametrize(
    ("law", "case"),
    [
        pytest.param(law, replace(case, params=case.params.replace(**changes)), id=f"{law}-{case}-{name}")
        for name, changes in VARIANTS.items()
        for law, case in laws_for(METHOD)
        if case.supports() and not case.label and str(law) in LAWS and (name == "xl" or str(law) in LAWS[:4])
    ],
)
def test_laws_of_variants(law, case):
    finding = law(case)
    assert finding.status == HELD or "oracle" in finding.message


@pytest.mark.parametrize("variant", ["hf", "xl"])
@pytest.mark.parametrize("mode", METHOD.modes)
@impls
def test_formulas_hold_in_bf16_with_several_layers_and_an_unfinished_segment(impl, mode, variant):
    dims = Dims(seq_len=4200, batch_size=1, d_model=64, num_heads=4, num_layers=2, d_ff=256)
    params = RMTParams(num_memory=24, variant=variant)
    cost, seen = METHOD.cost_of(impl, mode, True, "none", params), trace(METHOD, dims, params, impl, mode, "bf16")
    values = bindings(dims, params, 2, 512)
    assert evaluate(total(cost.flops), values) == seen.flops
    assert seen.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)


def test_cost_grows_linearly_in_a_chain_of_segments_and_a_stream_needs_the_same_memory_at_any_length():
    params = METHOD.params()
    for impl in ("reference", "blocked"):
        forward = METHOD.cost_of(impl, "forward", True, "none", params)
        assert big_o(total(forward.flops)) == big_o(forward.depth) == "O(T)"
        assert big_o(METHOD.cost_of(impl, "stream", True, "none", params).peak_bytes) == "O(1)"
        assert big_o(METHOD.cost_of(impl, "train", True, "none", params).peak_bytes) == "O(T)"
    values = bindings(Dims(seq_len=5000, num_layers=3), params, 4, 512)
    assert evaluate(METHOD.cost_of("blocked", "forward", True, "none", params).depth, values) == 3 * 10
    peaks = {trace(METHOD, Dims(seq_len=length), params, "blocked", "stream").peak_bytes for length in (1024, 2048)}
    assert len(peaks) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_memory": 0}, "num_memory must be at least 1, received 0"),
        ({"segment_len": 0}, "segment_len must be at least 1, received 0"),
        ({"bptt_depth": -2}, "bptt_depth must be at least -1, received -2"),
        ({"variant": "armt"}, "variant must be one of hf, xl, received 'armt'"),
    ],
    ids=["memory", "segment", "depth", "variant"],
)
def test_parameters_outside_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RMTParams(**values)
