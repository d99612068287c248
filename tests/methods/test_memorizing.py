"""Memorizing Transformer: a loop over single pairs, dense and exact top-k lookups, the memory as state, and counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations._shared.selection import best, padded
from ctxbench.implementations.memorizing import METHOD, blocked, native, reference
from ctxbench.implementations.memorizing.params import MemorizingParams, memory_layer, reach
from ctxbench.method import Dims
from ctxbench.workload import map_state, num_parameters, prepare, state_bytes, tensors

FORMS = {
    "topk": MemorizingParams(memory_len=13, segment_len=5, window=7, top_k=4),
    "dense": MemorizingParams(memory_len=13, segment_len=5, window=7, lookup="dense"),
    "long_memory": MemorizingParams(memory_len=64, segment_len=4, window=6, top_k=3),
    "short_memory": MemorizingParams(memory_len=3, segment_len=8, window=4, top_k=2),
    "one_key": MemorizingParams(memory_len=6, segment_len=3, window=1, top_k=1),
    "no_memory": MemorizingParams(memory_len=0, segment_len=4, window=5),
}
LENGTH = 29
SIZES = Dims(seq_len=LENGTH, d_model=12, num_heads=2, d_ff=16, num_layers=2, position="t5")
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", ["reference", "blocked", "native"])
fast = pytest.mark.parametrize("impl", ["blocked", "native"])
lookups = pytest.mark.parametrize(
    "lookup", [reference.lookup, blocked.lookup, native.lookup], ids=["reference", "blocked", "native"]
)


def build(impl: str, params: MemorizingParams, **dims: int | str) -> torch.nn.Module:
    torch.manual_seed(0)
    module = METHOD.make(SIZES.replace(**dims), params, impl, "cpu", torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(length: int = LENGTH, batch: int = 2, d_model: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, d_model, generator=generator, dtype=torch.float64)


def oracle(module: torch.nn.Module, x: torch.Tensor, params: MemorizingParams) -> torch.Tensor:
    """The equations token by token and head by head, one batch row; memory is detached pair by pair."""
    x = x[0]
    for index, layer in enumerate(module.layers):
        mixer, normed = layer.mixer, layer.norm_mixer(x)
        H, D = mixer.num_heads, mixer.head_dim
        rows = []
        for i in range(len(x)):
            heads = []
            for head in range(H):
                part = slice(head * D, (head + 1) * D)

                def unit(project, j, part=part, normed=normed):
                    y = project.weight[part] @ normed[j]
                    return y / y.square().sum().sqrt()

                q = unit(mixer.q, i) * mixer.scale[head]
                local = range(max(0, i - params.window + 1), i + 1)
                table = mixer.position.table.weight[:, head]
                scores = torch.stack([q @ unit(mixer.k, j) + table[t5_bucket(i - j)] for j in local])
                values = torch.stack([mixer.v.weight[part] @ normed[j] for j in local])
                out = scores.softmax(0) @ values
                if index == memory_layer(len(module.layers)):
                    share = torch.sigmoid(mixer.gate[head])
                    begin = i - i % params.segment_len
                    known = range(max(0, begin - params.memory_len), begin)
                    pairs = [(unit(mixer.k, j).detach(), (mixer.v.weight[part] @ normed[j]).detach()) for j in known]
                    pairs.sort(key=lambda pair, q=q: -float(q.detach() @ pair[0]))
                    if params.lookup == "topk":
                        pairs = pairs[: params.top_k]
                    found = torch.zeros_like(out)
                    if pairs:
                        weights = torch.stack([q @ key for key, _ in pairs]).softmax(0)
                        found = weights @ torch.stack([value for _, value in pairs])
                    out = (1 - share) * out + share * found
                heads.append(out)
            rows.append(mixer.o.weight @ torch.cat(heads))
        x = x + torch.stack(rows)
        x = x + layer.ffn(layer.norm_ffn(x))
    return x[None]


def t5_bucket(distance: int) -> int:
    return distance if distance < 16 else min(31, 16 + int(16 * math.log(distance / 16) / math.log(8)))


def compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10 * max(1.0, float(theirs.abs().max())))


def run(module: torch.nn.Module, x: torch.Tensor, function=None) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf).y if function is None else function(leaf)
    y.backward(torch.ones_like(y) + x)
    zero = torch.zeros(())
    return [y.detach(), leaf.grad, *(zero if p.grad is None else p.grad for p in module.parameters())]


@pytest.mark.parametrize("name", ["topk", "dense", "one_key"])
def test_reference_equals_a_loop_over_single_pairs(name):
    params, x = FORMS[name], tokens(17, batch=1)
    again = build("reference", params)
    compare(run(build("reference", params), x), run(again, x, lambda leaf: oracle(again, leaf, params)))


def test_distances_beyond_the_exact_buckets_share_them():
    params, x = MemorizingParams(memory_len=4, segment_len=9, window=25), tokens(25, batch=1)
    module = build("blocked", params, num_layers=1)
    with torch.no_grad():
        torch.testing.assert_close(module(x).y, oracle(module, x, params), rtol=0, atol=1e-11)


@forms
@fast
@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_fast_impls_equal_the_reference_with_all_gradients(params, impl, length):
    compare(*(run(build(one, params), tokens(length)) for one in ("reference", impl)))


@pytest.mark.parametrize("position", ["t5", "none", "alibi"])
@pytest.mark.parametrize(
    ("impl", "lookup"), [("blocked", "topk"), ("blocked", "dense"), ("native", "topk"), ("native", "dense")]
)
def test_fast_impls_equal_the_reference_over_several_blocks_and_slabs(impl, lookup, position, monkeypatch):
    monkeypatch.setattr(blocked, "SLAB", 1 << 12)
    monkeypatch.setattr(blocked, "ROWS", 16)
    params = MemorizingParams(memory_len=150, segment_len=70, window=140, top_k=5, lookup=lookup)
    compare(*(run(build(one, params, position=position), tokens(300)) for one in ("reference", impl)))


@lookups
def test_dense_lookup_is_plain_attention_and_so_is_top_k_of_everything(lookup):
    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64).unbind(0)
    expected = scaled_dot_product_attention(q, k, v, scale=1.0)
    for top_k in (None, 9, 12):
        torch.testing.assert_close(lookup(q, k, v, top_k), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(lookup(q, k, v, 8), expected)


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(("width", "count"), [(9, 3), (13, 3), (49, 3), (1000, 5), (8191, 32), (64, 1), (5, 1)])
def test_the_tournament_finds_what_a_sort_finds(width, count, equal):
    values = torch.randint(9, (6, width)).float() if equal else torch.rand(6, width)
    found, columns = best(values, count)
    torch.testing.assert_close(found, values.gather(1, columns), rtol=0, atol=0)
    expected = values.sort(dim=1, descending=True).values[:, :count]
    torch.testing.assert_close(found.sort(dim=1, descending=True).values, expected, rtol=0, atol=0)
    assert all(len(set(row)) == count for row in columns.tolist())
    assert columns.max() < width
    longer = torch.nn.functional.pad(values, (0, padded(width, count) - width), value=float("-inf"))
    torch.testing.assert_close(best(longer, count), (found, columns), rtol=0, atol=0)


@lookups
def test_top_k_reads_exactly_the_best_keys(lookup):
    q, k, v = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (3, 10, 10))
    scores = (q @ k.transpose(2, 3))[0, 0]
    for row, chosen in enumerate(scores.topk(4).indices.sort().values):
        alone = scaled_dot_product_attention(q[:, :, row : row + 1], k[:, :, chosen], v[:, :, chosen], scale=1.0)
        torch.testing.assert_close(lookup(q, k, v, 4)[:, :, row : row + 1], alone, rtol=0, atol=1e-12)


@impls
@forms
def test_streaming_equals_the_whole_sequence_for_any_cut(impl, params):
    module, x = build(impl, params), tokens()
    with torch.no_grad():
        whole = module(x).y
        for cut in ([1, 2, 11, 12, 20], [7, 28], list(range(1, LENGTH))):
            state, outputs = module.init_state(2), []
            for chunk in x.split(np.diff([0, *cut, LENGTH]).tolist(), dim=1):
                y, state = module(chunk, state)
                outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-12)


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
        values = bindings(SIZES.replace(seq_len=t + 1, batch_size=2), params, 8, METHOD.segment_len(params))
        assert state_bytes(after) == evaluate(formula, values)
        shapes = [a.shape for a in tensors(after)]
        assert [a.shape for a in tensors(module.state_at(2, t + 1))] == shapes
        state = after


def test_memory_is_handed_on_untouched_until_its_segment_ends():
    params = FORMS["topk"]
    module, x = build("blocked", params, num_layers=1), tokens(10)
    with torch.no_grad():
        (state,) = module(x[:, :5], module.init_state(2)).state
        (inside,) = module(x[:, 5:9], (state,)).state
        (ended,) = module(x[:, 9:], (inside,)).state
    assert inside.memory_k is state.memory_k
    assert ended.memory_k.shape[2] == 10
    assert torch.equal(ended.memory_k[:, :, :5], state.memory_k)


@impls
def test_memory_takes_values_and_gives_no_gradients(impl):
    params = MemorizingParams(memory_len=8, segment_len=4, window=1, top_k=8)
    module, x = build(impl, params, num_layers=1), tokens(12).requires_grad_()
    y = module(x).y
    y[:, 8:].square().sum().backward()
    assert not x.grad[:, :8].any()
    assert x.grad[:, 8:].abs().amin(dim=(0, 2)).gt(0).all()
    dims = SIZES.replace(seq_len=12, num_layers=1)
    with torch.no_grad():
        for j in range(12):
            moved = x.detach().clone()
            moved[:, j] *= -1.0
            gap = (module(moved).y - y).abs().amax(dim=(0, 2))
            assert set(torch.nonzero(gap > 1e-9)[:, 0].tolist()) == {
                i for i in range(12) if j in reach(dims, params, i)
            }


def test_gate_decides_between_window_and_memory():
    params = FORMS["dense"]
    module, x = build("blocked", params, num_layers=1), tokens()
    local = build("blocked", params.replace(memory_len=0), num_layers=1)
    with torch.no_grad():
        for stack in (module, local):
            stack.layers[0].mixer.gate.fill_(-50.0)
        torch.testing.assert_close(module(x).y, local(x).y, rtol=0, atol=1e-12)
        module.layers[0].mixer.gate.fill_(50.0)
        first = module(x).y[:, : params.segment_len]
        alone = x[:, : params.segment_len]  # nothing in memory: only the feed-forward network moves the residual
        layer = module.layers[0]
        torch.testing.assert_close(first, alone + layer.ffn(layer.norm_ffn(alone)), rtol=0, atol=1e-12)


def test_only_the_fourth_layer_from_the_top_has_a_memory():
    assert [memory_layer(n) for n in (1, 2, 4, 5, 12)] == [0, 0, 0, 1, 8]
    module = build("blocked", FORMS["topk"], num_layers=6)
    assert [hasattr(layer.mixer, "gate") for layer in module.layers] == [i == 2 for i in range(6)]


COUNTED = {
    "short": (MemorizingParams(memory_len=13, segment_len=5, window=7, top_k=4), 37),
    "dense": (MemorizingParams(memory_len=13, segment_len=5, window=7, lookup="dense"), 37),
    "blocks": (MemorizingParams(memory_len=200, segment_len=300, window=150, top_k=3), 571),
    "retrieves_all_at_first": (MemorizingParams(memory_len=400, segment_len=140, window=260, top_k=150), 571),
}


@pytest.mark.parametrize("mode", METHOD.modes)
@impls
@pytest.mark.parametrize("name", COUNTED)
def test_formulas_equal_what_is_counted(name, impl, mode):
    params, length = COUNTED[name]
    formula = METHOD.cost_of(impl, mode, True, "t5", params)
    for layers in (1, 5):
        dims = Dims(seq_len=length, batch_size=2, d_model=16, num_heads=2, num_layers=layers, d_ff=24, position="t5")
        work, values = prepare(METHOD, dims, params, impl, mode, "fp32"), bindings(dims, params, 4, params.segment_len)
        with Meter() as meter:
            work.call()
        assert evaluate(total(formula.flops), values) == meter.result().flops
        assert evaluate(formula.num_parameters, values) == num_parameters(work.module)
        assert not meter.result().uncounted


def test_exact_search_saves_the_values_half_alone():
    values = bindings(Dims(seq_len=65536), MemorizingParams(), 4, 512)
    terms = METHOD.cost_of("blocked", "forward", True, "t5", MemorizingParams()).flops
    search, read = (evaluate(terms[name], values) for name in ("search", "read"))
    assert read < search / 200
    dense = METHOD.cost_of("blocked", "forward", True, "t5", MemorizingParams(lookup="dense")).flops
    assert evaluate(dense["read"], values) == evaluate(dense["search"], values) == search


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("layers", [1, 3])
def test_peak_formula_is_within_three_percent_in_any_depth(mode, layers):
    dims = Dims(seq_len=4133, d_model=128, num_layers=layers, d_ff=512, position="t5")
    values = bindings(dims, MemorizingParams(), 4, 512)
    formula = evaluate(METHOD.cost_of("reference", mode, True, "t5", MemorizingParams()).peak_bytes, values)
    assert formula == pytest.approx(trace(METHOD, dims, MemorizingParams(), "reference", mode).peak_bytes, rel=0.03)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("length", [300, 512, 600, 1500, 2048])
def test_forward_peak_of_the_reference_is_exact_at_every_length(length, layers):
    """Pieces of the window, whole and ragged, and the segments' lookups take turns in deciding it."""
    dims = Dims(seq_len=length, num_layers=layers, causal=True, position="t5")
    values = bindings(dims, MemorizingParams(), 4, 512)
    formula = evaluate(METHOD.cost_of("reference", "forward", True, "t5", MemorizingParams()).peak_bytes, values)
    assert formula == trace(METHOD, dims, MemorizingParams(), "reference").peak_bytes


@fast
@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (127, {}), (300, {}), (450, {}), (600, {}), (300, {"batch_size": 2, "d_ff": 0}), (511, {"num_layers": 4}),
        (600, {"num_layers": 6}), (1024, {}), (1100, {}), (2048, {}), (4096, {}), (5000, {}),
        (1024, {"batch_size": 3}), (3000, {"batch_size": 3}),
        (3000, {"num_layers": 3}), (1024, {"num_heads": 16}), (3000, {"segment_len": 256}), (1024, {"top_k": 16}),
        (3000, {"memory_len": 2048}), (3000, {"memory_len": 2048, "d_ff": 0}), (20000, {"d_ff": 0}),
    ],
)  # fmt: skip
def test_forward_peak_counts_the_band_and_the_slab_of_the_worst_segment(length, changes, impl):
    own = {name: value for name, value in changes.items() if hasattr(MemorizingParams(), name)}
    params = MemorizingParams(**own)
    others = {name: value for name, value in changes.items() if name not in own}
    dims = Dims(**{"seq_len": length, "d_model": 256, "num_heads": 4, "d_ff": 1024, "num_layers": 1, **others})
    values = bindings(dims, params, 4, params.segment_len)
    formula = evaluate(METHOD.cost_of(impl, "forward", True, dims.position, params).peak_bytes, values)
    assert formula == trace(METHOD, dims, params, impl).peak_bytes


@pytest.mark.parametrize("mode", ["stream", "decode", "train"])
@pytest.mark.parametrize("impl", ["blocked", "native"])
@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (300, {"batch_size": 2}), (700, {"num_layers": 6, "d_ff": 0}), (1500, {"num_layers": 2, "batch_size": 3}),
        (2048, {"segment_len": 256, "memory_len": 900, "window": 64, "d_ff": 0}),
        (2100, {"top_k": 128, "position": "none", "d_ff": 0}),
    ],
)  # fmt: skip
def test_peak_counts_what_outlives_a_call_or_a_layer(length, changes, impl, mode):
    own = {name: value for name, value in changes.items() if hasattr(MemorizingParams(), name)}
    params = MemorizingParams(**own)
    others = {name: value for name, value in changes.items() if name not in own}
    sizes = {"d_model": 128, "num_heads": 4, "d_ff": 512, "num_layers": 1, "position": "t5", **others}
    dims = Dims(seq_len=length, causal=True, **sizes)
    values = bindings(dims, params, 4, params.segment_len)
    formula = evaluate(METHOD.cost_of(impl, mode, True, dims.position, params).peak_bytes, values)
    traced = trace(METHOD, dims, params, impl, mode).peak_bytes
    assert formula == pytest.approx(traced, rel=1e-3)  # but for a few numbers a head or a token
