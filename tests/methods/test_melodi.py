"""MELODI against loops written from its equations, its edge cases, its state, and its formulas."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.melodi import METHOD, blocked, reference
from ctxbench.implementations.melodi.norm import EPSILON
from ctxbench.implementations.melodi.params import MelodiParams, long_layer
from ctxbench.implementations.melodi.slots import Queue
from ctxbench.measure.allocator import measure
from ctxbench.method import DTYPE_BYTES, Dims
from ctxbench.testing import HELD, LAWS, Case, streamed
from ctxbench.workload import prepare, state_bytes

DOUBLE = torch.float64
GOLDEN = Path(__file__).parents[1] / "golden" / "melodi.npz"
TINY = Dims(seq_len=23, batch_size=2, d_model=8, num_heads=2, num_layers=3, d_ff=12, position="t5")
PARAMS = {
    "equal": MelodiParams(window=5, summary_tokens=3, short_slots=3, long_slots=6, long_per_window=2),
    "unequal": MelodiParams(window=5, summary_tokens=2, short_slots=4, long_slots=5, long_per_window=2),
    "short": MelodiParams(window=4, summary_tokens=2, short_slots=2, long_slots=0),
    "long": MelodiParams(window=4, summary_tokens=0, short_slots=0, long_slots=6, long_per_window=2),
    "no_summary": MelodiParams(window=4, summary_tokens=0, short_slots=2, long_slots=3, long_per_window=4),
    "window": MelodiParams(window=6, summary_tokens=0, short_slots=0, long_slots=0),
}
IMPLS = pytest.mark.parametrize("impl", ["reference", "blocked"])
VARIANTS = pytest.mark.parametrize("variant", PARAMS)
OPERATORS = pytest.mark.parametrize("operators", [reference.OPERATORS, blocked.OPERATORS], ids=["reference", "blocked"])


def make(impl="reference", variant="equal", seed=0, **dims):
    """A module in float64 whose parameters are all far from 0 and 1; the same weights for every impl."""
    module = METHOD.make(TINY.replace(**dims), PARAMS[variant], impl, "cpu", DOUBLE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE) * 0.6)
    return module


def tokens(length=23, batch=2, seed=1):
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


stream = torch.no_grad()(streamed)


# The equations, one window, one row, one head and one key at a time.


def norm(layer_norm, x):
    return layer_norm.weight * x / ((x * x).sum() / len(x) + EPSILON).sqrt()


def unit(x):
    return x / (x @ x + len(x) * EPSILON).sqrt()


def mixing(mixer, rows):
    return [
        sum(w * row for w, row in zip(weights, rows, strict=True)) + b
        for weights, b in zip(mixer.weight, mixer.bias, strict=True)
    ]


def bucket(distance):
    return distance if distance < 16 else min(16 + int(math.log(distance / 16) / math.log(8) * 16), 31)


def weighted(scores, values):
    weights = [torch.exp(score) for score in scores]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def oracle_window(layer, rows, z, memory):
    """Rows of one window, tokens and then summary tokens, with the slots they find; before the token mixing."""
    heads, width = layer.num_heads, layer.head_dim
    table = getattr(layer.position, "table", None)
    before = [norm(layer.norm, row) for row in (*z, *rows)]
    slots = [norm(layer.norm, slot) for slot in memory]
    found = []
    for number, row in enumerate(rows):
        place, parts = len(z) + number, []
        for head in range(heads):
            own, size = slice(head * width, (head + 1) * width), layer.scale[head].abs()
            q = unit((layer.q.weight @ before[place])[own])
            scores, values = [], []
            for j in range(place):
                bias = table.weight[bucket(place - j), head] if table is not None else 0.0
                scores.append(size * (q @ unit((layer.k.weight @ before[j])[own]) + bias))
                values.append((layer.v.weight @ before[j])[own])
            part = weighted(scores, values) if scores else torch.zeros(width, dtype=DOUBLE)
            if layer.gate is not None:
                recalled = weighted(
                    [size * (q @ unit((layer.k.weight @ slot)[own])) for slot in slots],
                    [(layer.v.weight @ slot)[own] for slot in slots],
                )
                alpha = torch.sigmoid(layer.gate[head, 0])
                part = alpha * part + (1 - alpha) * recalled
            parts.append(part)
        row = row + layer.o.weight @ torch.cat(parts)
        if layer.ffn is not None:
            up = (layer.ffn.up.weight @ norm(layer.norm_ffn, row) + layer.ffn.up.bias).clamp(min=0)
            row = row + layer.ffn.down.weight @ up + layer.ffn.down.bias
        found.append(row)
    return found


def oracle(module, x, params):
    """``x: [T, d_model]``: windows through all layers; memories are lists of embeddings, full of zeros at first."""
    zero = torch.zeros(x.shape[1], dtype=DOUBLE)
    z = [[zero] * params.short_slots for _ in module.layers]
    memory, outputs = [zero] * params.long_slots, []
    for window in x.split(params.window):
        rows = [*window, *([] if module.summary is None else module.summary)]
        for index, layer in enumerate(module.layers):
            rows = oracle_window(layer, rows, z[index], memory)
            if len(window) < params.window:
                continue
            u = rows[params.window :]
            normed = rows if layer.norm_mix is None else [norm(layer.norm_mix, row) for row in rows]
            if layer.mix_long is not None:
                memory = [*memory, *mixing(layer.mix_long, rows)][-params.long_slots :]
            if layer.mix_short is not None and len(u) == params.short_slots:
                z[index] = [a + b for a, b in zip(u, mixing(layer.mix_short, normed), strict=True)]
            elif layer.mix_short is not None:
                z[index] = mixing(layer.mix_short, rows)
            if layer.mix_summary is not None:
                u = [a + b for a, b in zip(u, mixing(layer.mix_summary, normed), strict=True)]
            rows = [*rows[: params.window], *u]
        outputs += rows[: len(window)]
    return torch.stack(outputs)


@pytest.mark.parametrize(("most", "size", "pushes"), [(7, 3, 20), (6, 2, 3), (5, 8, 4), (4, 4, 9), (6, 2, 1)])
@pytest.mark.parametrize("filled", [0, 3])
def test_the_queue_holds_the_last_slots_and_nothing_it_gave_changes(most, size, pushes, filled):
    generator = torch.Generator().manual_seed(0)

    def draw(rows):
        return tuple(torch.randn(2, 3, rows, 4, generator=generator) for _ in "kv")

    queue, held = Queue(most, pushes), draw(min(filled, most))
    everything = list(held)
    with torch.no_grad():
        for _ in range(pushes):
            before, new = [part.clone() for part in held], draw(size)
            after = queue.push(held, new)
            everything = [torch.cat(both, dim=2) for both in zip(everything, new, strict=True)]
            for part, kept, found, wanted in zip(held, before, after, everything, strict=True):
                assert torch.equal(part, kept)
                assert torch.equal(found, wanted[:, :, -most:])
            held = after
    assert not queue.places or queue.places[0].shape[2] <= 2 * most + size


@VARIANTS
@IMPLS
def test_what_is_written_in_place_without_gradients_is_what_is_joined_with_them(impl, variant):
    module, x = make(impl, variant), tokens(97)
    kept = x.clone()
    joined = module(x).y
    with torch.no_grad():
        placed, state = module(x).y, module(x, module.init_state(2)).state
        again = module(x[:, :7], state).y
    continued = module(x[:, :7], module(x, module.init_state(2)).state).y
    torch.testing.assert_close(placed, joined, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, continued, rtol=0, atol=1e-12)
    assert torch.equal(x, kept)
    for memory in state.layers:
        assert memory.long_k.untyped_storage().nbytes() == memory.long_k.numel() * memory.long_k.element_size()


@pytest.mark.parametrize("d_ff", [12, 0], ids=["ffn", "no_ffn"])
@VARIANTS
def test_outputs_and_gradients_equal_the_equations(variant, d_ff):
    modules = [make(impl, variant, d_ff=d_ff, num_layers=2) for impl in ("reference", "reference", "blocked")]
    length, found = 2 * PARAMS[variant].window + 3, []
    for index, module in enumerate(modules):
        x = tokens(length, batch=1).requires_grad_()
        y = module(x).y if index else oracle(module, x[0], PARAMS[variant])[None]
        y.backward(tokens(length, batch=1, seed=2))
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append({"y": y.detach(), "x": x.grad, **grads})
    for mine in found[1:]:
        for name, expected in found[0].items():
            torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-11, msg=name)


@VARIANTS
@pytest.mark.parametrize("position", ["t5", "rope_yarn"])
def test_blocked_equals_reference_over_many_windows(variant, position):
    found = []
    for impl in ("reference", "blocked"):
        module, x = make(impl, variant, position=position), tokens(37).requires_grad_()
        y = module(x).y
        y.backward(tokens(37, seed=2))
        found.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# Parts, one by one.


def test_distances_fall_into_the_buckets_of_t5():
    golden = np.load(GOLDEN)
    before, expected = torch.from_numpy(golden["before"]), golden["bucket"].tolist()
    layer = make(num_heads=1).layers[0]
    with torch.no_grad():
        layer.position.table.weight.copy_(torch.arange(32, dtype=DOUBLE)[:, None])
        assert layer.position.bias(before, DOUBLE)[0].tolist() == expected
        layer.scale.fill_(-2.0)  # its size counts
        bias = layer.biases(4, 600)
    assert bias[0, 0].tolist() == [2 * bucket for bucket in expected[597:0:-1]] + [-math.inf] * 3
    assert bias[0, -1].tolist() == [2 * bucket for bucket in expected[600:0:-1]]
    assert [bucket(-int(distance)) for distance in before] == expected


@OPERATORS
@pytest.mark.parametrize("rows", [1, 4], ids=["one", "several"])
def test_a_row_that_sees_no_key_gets_zero(operators, rows):
    layer = make(variant="window").layers[0]
    q, k, v = (torch.randn(2, 2, n, 4, dtype=DOUBLE) for n in (rows, rows - 1, rows - 1))
    with torch.no_grad():
        mixed = operators.attend(q, k, v, layer.biases(rows, rows - 1))
    assert (mixed[:, :, 0] == 0).all()
    assert (mixed[:, :, 1:] != 0).all()


@OPERATORS
@pytest.mark.parametrize(("filled", "empty"), [(0, 5), (3, 4), (3, 0)])
def test_empty_slots_are_zeros_that_everybody_sees(operators, filled, empty):
    q, k, v = (torch.randn(2, 2, n, 4, dtype=DOUBLE) for n in (6, filled, filled))
    padded = [torch.cat((slots, torch.zeros(2, 2, empty, 4, dtype=DOUBLE)), dim=2) for slots in (k, v)]
    expected = scaled_dot_product_attention(q, *padded, scale=1.0)
    torch.testing.assert_close(operators.recall(q, k, v, empty), expected, rtol=0, atol=1e-14)


@IMPLS
def test_an_open_gate_leaves_the_short_term_layer(impl):
    long, short = make(impl), METHOD.make(TINY, PARAMS["equal"].replace(long_slots=0), impl, "cpu", DOUBLE)
    short.load_state_dict(long.state_dict(), strict=False)
    x = tokens()
    with torch.no_grad():
        assert (long(x).y - short(x).y).abs().max() > 1e-3
        long.layers[1].gate.fill_(60.0)
        torch.testing.assert_close(long(x).y, short(x).y, rtol=0, atol=1e-12)


@IMPLS
def test_without_memories_it_is_strictly_causal_attention_in_windows(impl):
    module = make(impl, "window", num_layers=1, d_ff=0, position="none")
    (layer,), x = module.layers, tokens(18)
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(x, (8,), layer.norm.weight, EPSILON).view(6, 6, 2, 4).transpose(1, 2)
        q, k, v = (
            part(normed.transpose(1, 2).flatten(2)).view(6, 6, 2, 4).transpose(1, 2)
            for part in (layer.q, layer.k, layer.v)
        )
        q, k = (part / (part.square().sum(dim=3, keepdim=True) + 4 * EPSILON).sqrt() for part in (q, k))
        mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)
        mixed = scaled_dot_product_attention(q * layer.scale.abs().view(2, 1, 1), k, v, attn_mask=mask, scale=1.0)
        mixed[:, :, 0] = 0
        expected = x + layer.o(mixed.transpose(1, 2).reshape(2, 18, 8))
        torch.testing.assert_close(module(x).y, expected, rtol=0, atol=1e-12)


def test_without_mixing_summary_tokens_pass_and_are_the_short_term_memory():
    module = make(num_layers=2)
    layer, rows, memory = module.layers[0], tokens(8), module.init_state(2).layers[0]
    with torch.no_grad():
        for mixer in (layer.mix_summary, layer.mix_short):
            mixer.weight.zero_()
            mixer.bias.zero_()
        bias = layer.biases(8, 10)
        after, closed = layer(rows, 3, memory, bias, True)
        before, _ = layer(rows, 3, memory, bias, False)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        torch.testing.assert_close(closed.k, layer._remembered(before[:, 5:])[0], rtol=0, atol=0)


def test_the_middle_layer_alone_has_the_long_term_memory():
    params = METHOD.params()
    assert [long_layer(TINY.replace(num_layers=layers), params) for layers in (1, 2, 12, 13)] == [0, 1, 6, 6]
    assert [layer.gate is not None for layer in make().layers] == [False, True, False]


@IMPLS
def test_gradients_pass_memories_within_a_call_and_never_between_calls(impl):
    module, x = make(impl), tokens(20).requires_grad_()
    module(x).y[:, 17:].sum().backward()
    assert x.grad.abs().amax(dim=(0, 2)).min() > 0
    _, state = module(x[:, :7], module.init_state(2))
    assert not any(part.requires_grad for memory in state.layers for part in memory)


# State.


@IMPLS
@VARIANTS
def test_chunks_of_any_length_equal_the_whole_sequence(impl, variant):
    for position in ("t5", "rope"):
        module, x = make(impl, variant, position=position), tokens(23)
        with torch.no_grad():
            whole = module(x).y
        for sizes in ([1] * 23, [5, 5, 5, 5, 3], [23], [3, 1, 12, 7], [4, 4, 2, 13]):
            y, _ = stream(module, x, sizes)
            torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)


def test_impls_hand_their_states_to_one_another():
    slow, fast = make("reference"), make("blocked")
    x = tokens(23)
    with torch.no_grad():
        first = slow(x[:, :8], slow.init_state(2))
        rest = fast(x[:, 8:], first.state).y
        torch.testing.assert_close(torch.cat((first.y, rest), dim=1), slow(x).y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@VARIANTS
def test_state_bytes_follow_the_formula_at_every_length(variant, dtype):
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    module = METHOD.make(TINY, PARAMS[variant], "blocked", "cpu", torch_dtype)
    formula = METHOD.cost_of("blocked", "stream", True, "t5", PARAMS[variant]).state_bytes
    state = module.init_state(2)
    for length in range(1, 17):
        with torch.no_grad():
            state = module(tokens(1, seed=length).to(torch_dtype), state).state
        values = bindings(TINY.replace(seq_len=length), PARAMS[variant], DTYPE_BYTES[dtype], PARAMS[variant].window)
        assert state_bytes(state) == evaluate(formula, values), length


def test_the_papers_memory_is_ours_with_the_short_slots_counted_once():
    """13 layers, 128 short slots, 64 long slots of each of 128 windows: 18.5 M elements, as embeddings and as keys."""
    params = MelodiParams(summary_tokens=128, short_slots=128, long_slots=64 * 128, long_per_window=64)
    dims = Dims(seq_len=128 * 512, d_model=1024, num_heads=8, num_layers=13)
    ours = evaluate(METHOD.cost_of("blocked", "stream", True, "t5", params).state_bytes, bindings(dims, params, 1, 512))
    embeddings = 13 * 128 * 1024
    assert ours == 2 * embeddings + 2 * 64 * 128 * 1024
    assert ours - embeddings == pytest.approx(18.5e6, rel=0.01)


# Laws and cost.


def law_cases():
    """The laws of the kit on the variants that it does not meet by itself."""
    named = ("unequal", "long", "window")
    rounds = [
        *itertools.product(
            named,
            ("blocked",),
            ("flops_equal_formula", "receptive_field", "parameters_equal_formula", "state_shapes", "purity"),
        ),
        *itertools.product(("unequal", "no_summary"), ("blocked",), ("gradients_reach_everything", "decode_continues")),
        ("unequal", "reference", "flops_equal_formula"),
        ("unequal", "blocked", "gradcheck"),
    ]
    return [pytest.param(*each, id="-".join(each)) for each in rounds]


@pytest.mark.parametrize(("variant", "impl", "law"), law_cases())
def test_every_variant_keeps_the_law(variant, impl, law):
    case = Case(METHOD, impl, PARAMS[variant], TINY, METHOD.modes)
    finding = LAWS[law](case)
    assert finding.status == HELD, finding.message


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_peaks_hold_with_several_layers_rows_and_an_open_window(impl, mode):
    dims = Dims(seq_len=1100, batch_size=2, d_model=64, num_heads=4, num_layers=2, d_ff=256, position="t5")
    params = MelodiParams(window=128, summary_tokens=16, short_slots=32, long_slots=256, long_per_window=64)
    cost, seen = METHOD.cost_of(impl, mode, True, "t5", params), trace(METHOD, dims, params, impl, mode)
    values = bindings(dims, params, 4, 128)
    assert evaluate(total(cost.flops), values) == seen.flops
    assert seen.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)


@pytest.mark.parametrize("mode", ["forward", "stream"])
def test_the_allocator_sees_the_peak_that_the_tracer_sees(mode):
    """Nothing is copied inside a kernel, not even a bias."""
    dims, params = Dims(seq_len=1300, d_model=64, num_heads=8, num_layers=1, d_ff=64, position="t5"), MelodiParams()
    work = prepare(METHOD, dims, params, "blocked", mode, "fp32", "cpu", rotate=1)
    work.call()
    assert measure(work.call)[0] == pytest.approx(trace(METHOD, dims, params, "blocked", mode).peak_bytes, rel=0.02)


def test_cost_is_linear_and_a_stream_needs_bounded_memory():
    params = METHOD.params()
    costs = {mode: METHOD.cost_of("blocked", mode, True, "t5", params) for mode in METHOD.modes}
    assert big_o(total(costs["forward"].flops)) == big_o(costs["train"].peak_bytes) == "O(T)"
    assert big_o(total(costs["decode"].flops)) == big_o(costs["stream"].peak_bytes) == "O(1)"
    assert big_o(costs["stream"].state_bytes) == "O(1)"


def test_blocked_pays_for_filled_slots_and_one_null_slot():
    """Before window k there are min(4096, 32 k) filled slots."""
    terms = {
        impl: METHOD.cost_of(impl, "forward", True, "t5", METHOD.params()).flops["recall"]
        for impl in ("reference", "blocked")
    }
    values = bindings(Dims(seq_len=4096, d_model=64), METHOD.params(), 4, 512)
    rows = [576] * 7 + [512]
    filled = sum(n * (32 * k + 1) for k, n in enumerate(rows) if k)
    assert evaluate(terms["blocked"], values) == 4 * 64 * filled
    assert evaluate(terms["reference"], values) == 4 * 64 * 4096 * sum(rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"short_slots": 0}, "short_slots must be at least 1 with summary tokens, received 0"),
        ({"window": 0}, "window must be at least 1, received 0"),
        ({"long_per_window": 0}, "long_per_window must be at least 1, received 0"),
    ],
    ids=["short", "window", "long"],
)
def test_parameters_outside_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        METHOD.params().replace(**values)
