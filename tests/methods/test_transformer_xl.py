"""Transformer-XL: parity with two packages and a triple loop, streaming, cut gradients, counts, and the sketch."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import relative
from ctxbench.implementations._shared.staircase import BLOCK, blocks
from ctxbench.implementations.transformer_xl import METHOD
from ctxbench.implementations.transformer_xl.layer import sinusoids
from ctxbench.implementations.transformer_xl.params import TransformerXLParams, reach
from ctxbench.method import Dims
from ctxbench.testing import streamed
from ctxbench.workload import map_state, state_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
PARITY = {
    "xlnet/short_memory": TransformerXLParams(segment_len=4, mem_len=3),
    "xlnet/long_memory": TransformerXLParams(segment_len=3, mem_len=8),
    "transfo/plain": TransformerXLParams(segment_len=4, mem_len=3, start="zeros"),
    "transfo/same_length": TransformerXLParams(segment_len=4, mem_len=4, same_length=True, start="zeros"),
    "transfo/clamped": TransformerXLParams(segment_len=3, mem_len=7, clamp_len=4, start="zeros"),
}
FORMS = {
    "equal": TransformerXLParams(segment_len=5, mem_len=5),
    "long_memory": TransformerXLParams(segment_len=4, mem_len=11),
    "short_memory": TransformerXLParams(segment_len=7, mem_len=3),
    "no_memory": TransformerXLParams(segment_len=6, mem_len=0),
    "one_segment": TransformerXLParams(segment_len=64, mem_len=2),
    "token_segments": TransformerXLParams(segment_len=1, mem_len=4),
    "zeros": TransformerXLParams(segment_len=5, mem_len=6, start="zeros"),
    "same_length": TransformerXLParams(segment_len=4, mem_len=6, same_length=True),
    "same_length_zeros": TransformerXLParams(segment_len=4, mem_len=6, same_length=True, start="zeros"),
    "clamped": TransformerXLParams(segment_len=5, mem_len=9, clamp_len=4),
}
LENGTH = 29
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


def build(impl: str, params: TransformerXLParams, seed: int = 0, **dims: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = Dims(**{"seq_len": LENGTH, "d_model": 12, "num_heads": 2, "d_ff": 16, "num_layers": 2, **dims})
    module = METHOD.make(sizes, params, impl, "cpu", torch.float64)
    with torch.no_grad():
        for layer in module.layers:
            layer.mixer.content_bias.normal_()
            layer.mixer.position_bias.normal_()
    return module


def tokens(length: int = LENGTH, batch: int = 2, d_model: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, d_model, generator=generator, dtype=torch.float64)


@impls
@pytest.mark.parametrize("name", PARITY)
def test_outputs_and_gradients_equal_those_of_transformers(impl, name):
    package, _, case = name.partition("/")
    golden = {
        key.removeprefix(f"{case}/"): torch.from_numpy(value).double()
        for key, value in np.load(GOLDEN / f"transformer_xl_{package}.npz").items()
        if key.startswith(f"{case}/")
    }
    x = golden["x"].clone().requires_grad_()
    module = build(impl, PARITY[name], d_model=8, d_ff=12)
    module.load_state_dict({key: golden[key] for key in module.state_dict()})
    y = module(x).y
    y.backward(golden["grad"])
    found = {"y": y, "grad.x": x.grad, **{f"grad.{key}": p.grad for key, p in module.named_parameters()}}
    assert len(found) == 2 + 30
    for key, value in found.items():
        scale = max(1.0, golden[key].abs().max().item())
        torch.testing.assert_close(value, golden[key], rtol=0, atol=5e-6 * scale, msg=lambda text, key=key: key + text)


def oracle(module: torch.nn.Module, x: torch.Tensor, params: TransformerXLParams) -> torch.Tensor:
    """The equations token by token: scores of one query and one key at a time, in Python loops."""
    for layer in module.layers:
        mixer, out = layer.mixer, torch.zeros_like(x)
        H, D = mixer.content_bias.shape
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                begin = i - i % params.segment_len
                oldest = begin - params.mem_len
                keys = range(oldest if params.start == "zeros" else max(oldest, 0), i + 1)
                if params.same_length:
                    keys = [j for j in keys if i - j < params.mem_len]
                for head in range(H):
                    part = slice(head * D, (head + 1) * D)
                    q = mixer.q.weight[part] @ x[b, i]
                    scores, values = [], []
                    for j in keys:
                        hidden = x[b, j] if j >= 0 else torch.zeros_like(x[b, 0])
                        if j < begin:
                            hidden = hidden.detach()
                        distance = min(i - j, params.clamp_len) if params.clamp_len else i - j
                        r = mixer.r.weight[part] @ sinusoids(distance + 1, x.shape[2])[-1]
                        content = (q + mixer.content_bias[head]) @ (mixer.k.weight[part] @ hidden)
                        scores.append((content + (q + mixer.position_bias[head]) @ r) / math.sqrt(D))
                        values.append(mixer.v.weight[part] @ hidden)
                    mixed = torch.stack(scores).softmax(0) @ torch.stack(values)
                    out[b, i, part] = mixed
        x = layer.norm_mixer(x + mixer.o(out))
        x = layer.norm_ffn(x + layer.ffn.down(layer.ffn.up(x).relu()))
    return x


@forms
def test_reference_equals_a_loop_over_single_pairs(params):
    module, x = build("reference", params), tokens(11, batch=1)
    again = build("reference", params)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(mine).y, oracle(again, theirs, params)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)
    for ours, oracles in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, oracles.grad, rtol=0, atol=1e-10)


@forms
@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_blocked_equals_reference_with_all_gradients(params, length):
    compare_impls(params, tokens(length))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("same_length", [False, True], ids=["staircase", "band"])
def test_blocked_equals_reference_where_a_segment_has_several_blocks(batch, same_length):
    params = TransformerXLParams(segment_len=BLOCK + 7, mem_len=BLOCK + 3, same_length=same_length)
    compare_impls(params, tokens(3 * BLOCK + 1, batch))


def compare_impls(params: TransformerXLParams, x: torch.Tensor) -> None:
    results = []
    for impl in ("reference", "blocked"):
        module, own = build(impl, params), x.clone().requires_grad_()
        y = module(own).y
        y.backward(torch.ones_like(y) + x)
        with torch.no_grad():
            without = module(x).y
        results.append([y, without, own.grad, *(parameter.grad for parameter in module.parameters())])
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)


@impls
@forms
def test_streaming_equals_the_whole_sequence_for_any_cut(impl, params):
    module, x = build(impl, params), tokens()
    draw = random.Random(impl)
    with torch.no_grad():
        whole = module(x).y
        cuts = [sorted(draw.sample(range(1, LENGTH), draw.randint(1, 6))) for _ in range(2)]
        for cut in (*cuts, list(range(1, LENGTH))):
            sizes = np.diff([0, *cut, LENGTH]).tolist()
            torch.testing.assert_close(streamed(module, x, sizes).y, whole, rtol=0, atol=1e-12)


@impls
@forms
def test_state_has_the_declared_size_after_every_token_and_is_a_value(impl, params):
    module, x = build(impl, params), tokens()
    formula = METHOD.cost_of(impl, "stream", True, "transformer_xl", params).state_bytes
    state = module.init_state(2)
    for t in range(LENGTH):
        before = map_state(torch.clone, state)
        with torch.no_grad():
            y, after = module(x[:, t : t + 1], state)
            again = module(x[:, t : t + 1], state).y
        torch.testing.assert_close(y, again, rtol=0, atol=0)
        for old, kept in zip(before, state, strict=True):
            assert torch.equal(old.hidden, kept.hidden)
        dims = Dims(seq_len=t + 1, batch_size=2, d_model=12, num_heads=2, d_ff=16, num_layers=2)
        values = bindings(dims, params, 8, METHOD.segment_len(params))
        assert state_bytes(after) == evaluate(formula, values)
        shapes = [(part.hidden.shape, part.phase) for part in after]
        assert [(part.hidden.shape, part.phase) for part in module.state_at(2, t + 1)] == shapes
        assert all(part.hidden.untyped_storage().nbytes() == part.hidden.nbytes for part in after)
        state = after


@impls
def test_memory_passes_gradients_to_weights_and_none_to_earlier_segments(impl):
    params = TransformerXLParams(segment_len=4, mem_len=4)
    module, x = build(impl, params, num_layers=1), tokens(8).requires_grad_()
    module(x).y[:, 4:].square().sum().backward()
    assert not x.grad[:, :4].any()
    assert x.grad[:, 4:].abs().amin(dim=(0, 2)).gt(0).all()
    with_memory = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    alone = build(impl, params.replace(mem_len=0), num_layers=1)
    alone(tokens(8)).y[:, 4:].square().sum().backward()
    gradients = dict(alone.named_parameters())
    for name in ("k", "v", "r"):
        key = f"layers.0.mixer.{name}.weight"
        assert not torch.allclose(with_memory[key], gradients[key].grad)


@impls
def test_memory_changes_later_outputs_up_to_the_end_of_its_reach(impl):
    params = TransformerXLParams(segment_len=3, mem_len=2)
    module, x = build(impl, params), tokens(12, batch=1)
    dims = Dims(seq_len=12, d_model=12, num_heads=2, num_layers=2)
    with torch.no_grad():
        plain = module(x).y[0]
        for j in range(12):
            moved = x.clone()
            moved[0, j] += 1.0
            changed = {i for i in range(12) if not torch.allclose(module(moved).y[0, i], plain[i], rtol=0, atol=1e-9)}
            assert changed == {i for i in range(12) if j in reach(dims, params, i)}


@pytest.mark.parametrize("heads", [1, 4, 64])
@pytest.mark.parametrize(("phase", "memory"), [(0, 0), (0, 5), (3, 0), (3, 5), (150, 0), (150, 50)])
@pytest.mark.parametrize(("segment_len", "mem_len"), [(4, 5), (300, 50), (200, 0), (200, 400)])
def test_blocks_cover_every_query_once_with_all_its_keys(segment_len, mem_len, phase, memory, heads):
    phase %= segment_len
    past = phase + min(memory, mem_len)
    length, seen = 901, {}
    for block in blocks(length, past, phase, segment_len, mem_len, heads, slab=1 << 16):
        for segment in range(block.count):
            for row in range(block.queries):
                query = block.first + segment * block.rows + block.offset + row
                assert query not in seen
                first_key = block.first_key + segment * block.rows
                seen[query] = first_key
                begin = query - (phase + query) % segment_len
                assert first_key == max(begin - mem_len, -past)
                assert first_key + block.keys > query
                assert block.own == block.keys - (begin - first_key)
    assert sorted(seen) == list(range(length))


COUNTED = {
    "long_memory_band": (TransformerXLParams(segment_len=16, mem_len=40, same_length=True), (1, 17, 97)),
    "zeros": (TransformerXLParams(segment_len=16, mem_len=7, start="zeros"), (15, 64)),
    "tokens": (TransformerXLParams(segment_len=1, mem_len=3, same_length=True), (9,)),
    "several_blocks": (TransformerXLParams(segment_len=300, mem_len=300), (701,)),
}


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", ["reference", "blocked", "as_written"])
@pytest.mark.parametrize("name", COUNTED)
def test_formulas_equal_what_is_counted(name, impl, mode):
    params, lengths = COUNTED[name]
    if not METHOD.impl_support(METHOD.impl(impl), mode, Dims(seq_len=4), params, "cpu", "fp32"):
        assert impl == "as_written"
        return
    formula = METHOD.cost_of(impl, mode, True, "transformer_xl", params)
    for length in lengths:
        dims = Dims(seq_len=length, batch_size=2, d_model=32, num_heads=4, num_layers=1, d_ff=48)
        counted = trace(METHOD, dims, params, impl, mode)
        values = bindings(dims, params, 4, METHOD.segment_len(params))
        assert evaluate(total(formula.flops), values) == counted.flops
        assert evaluate(formula.num_parameters, values) == counted.num_parameters
        assert not counted.uncounted
        if counted.state_bytes is not None:
            assert evaluate(formula.state_bytes, values) == counted.state_bytes


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", ["reference", "blocked", "as_written"])
def test_peak_formula_is_within_three_percent(impl, mode):
    params = TransformerXLParams(segment_len=384, mem_len=1024)
    dims = Dims(seq_len=4133, batch_size=2, num_layers=2, d_ff=512)
    values = bindings(dims, params, 4, METHOD.segment_len(params))
    formula = evaluate(METHOD.cost_of(impl, mode, True, "transformer_xl", params).peak_bytes, values)
    assert formula == pytest.approx(trace(METHOD, dims, params, impl, mode).peak_bytes, rel=0.03)


def test_one_token_reads_its_state_without_projecting_it():
    params = TransformerXLParams()
    dims = Dims(seq_len=8192)
    values = bindings(dims, params, 4, 512)
    costs = {
        impl: evaluate(total(METHOD.cost_of(impl, "decode", True, "transformer_xl", params).flops), values)
        for impl in ("reference", "blocked")
    }
    assert costs["reference"] > 40 * costs["blocked"]


def test_gradients_of_the_operator_equal_finite_differences_within_a_segment():
    params = TransformerXLParams(segment_len=6, mem_len=4)
    module = build("blocked", params, num_layers=1)
    x = tokens(6, batch=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: module(x).y, (x,), fast_mode=True)


def test_a_band_needs_a_memory():
    with pytest.raises(ValueError, match="same_length needs mem_len of at least 1"):
        TransformerXLParams(mem_len=0, same_length=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"mem_len": 0}, "mem_len = 0"), ({"start": "zeros"}, "zeros start"), ({"clamp_len": 9}, "clamp_len")],
    ids=["no_memory", "zeros", "clamped"],
)
def test_sketch_refuses_what_it_does_not_have(changes, reason):
    params = TransformerXLParams(**changes)
    answer = METHOD.impl_support(METHOD.impl("as_written"), "forward", Dims(seq_len=8), params, "cpu", "fp32")
    assert not answer.ok
    assert reason in answer.reason


def test_sketch_sees_later_tokens():
    module, x = build("as_written", TransformerXLParams(segment_len=4, mem_len=4)), tokens(12)
    moved = x.clone()
    moved[:, -1] += 1.0
    with torch.no_grad():
        assert (module(x).y[:, 0] - module(moved).y[:, 0]).abs().max() > 1e-6


def test_sketch_keeps_its_memory_on_the_module_whatever_state_it_is_given():
    module, x = build("as_written", TransformerXLParams(segment_len=4, mem_len=4)), tokens(8)
    with torch.no_grad():
        _, state = module(x[:, :4], module.init_state(2))
        first = module(x[:, 4:], state).y
        second = module(x[:, 4:], state).y
    assert not torch.allclose(first, second)


def test_sketch_cannot_train_across_calls_shorter_than_its_memory():
    module, x = build("as_written", TransformerXLParams(segment_len=4, mem_len=64)), tokens(8)
    y, state = module(x[:, :4], module.init_state(2))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        module(x[:, 4:], state).y.sum().backward()


def test_operator_takes_a_batch_of_several_without_copying_distances():
    geometry = relative.Geometry(segment_len=4, mem_len=4, same_length=False, past=0, phase=0)
    generator = torch.Generator().manual_seed(0)
    heads, batch, length, width = 2, 3, 10, 4
    streams = [torch.randn(heads * batch, length, width, generator=generator) for _ in range(4)]
    r = torch.randn(heads, 8, width, generator=generator)
    together = relative.staircase(relative.Operands(*streams, r), geometry).view(heads, batch, length, width)
    for row in range(batch):
        alone = [a.view(heads, batch, length, width)[:, row] for a in streams]
        expected = relative.staircase(relative.Operands(*alone, r), geometry)
        torch.testing.assert_close(together[:, row], expected)
