"""Compressive Transformer: parity with labml-nn and a triple loop, losses, streaming, cut gradients, counts."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import conv1d

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.positions import sinusoids
from ctxbench.implementations._shared.staircase import BLOCK, Far, blocks
from ctxbench.implementations.compressive_transformer import METHOD
from ctxbench.implementations.compressive_transformer.compression import most_used
from ctxbench.implementations.compressive_transformer.layer import State
from ctxbench.implementations.compressive_transformer.losses import attention_reconstruction, auto_encoding
from ctxbench.implementations.compressive_transformer.params import CompressiveTransformerParams as Parameters
from ctxbench.implementations.compressive_transformer.params import reach
from ctxbench.method import Dims
from ctxbench.testing import streamed
from ctxbench.workload import map_state, state_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "compressive_transformer.npz"
PARITY = {
    "two_layers": Parameters(segment_len=4, mem_len=4, compressed_len=4, rate=2),
    "overlapping": Parameters(segment_len=6, mem_len=3, compressed_len=3, rate=3),
    "long": Parameters(segment_len=2, mem_len=6, compressed_len=5, rate=2),
}
FORMS = {
    "conv": Parameters(segment_len=6, mem_len=9, compressed_len=5, rate=3),
    "auto_encoding": Parameters(segment_len=4, mem_len=4, compressed_len=3, rate=2, auxiliary="auto_encoding"),
    "no_loss": Parameters(segment_len=2, mem_len=2, compressed_len=9, rate=2, auxiliary="none"),
    "few_entries": Parameters(segment_len=8, mem_len=4, compressed_len=1, rate=2),
    "no_memory": Parameters(segment_len=4, mem_len=0, compressed_len=4, rate=2, compression="mean"),
    "max": Parameters(segment_len=4, mem_len=6, compressed_len=5, rate=2, compression="max"),
    "every_token": Parameters(segment_len=1, mem_len=3, compressed_len=4, rate=1, compression="mean"),
    "dilated_conv": Parameters(segment_len=6, mem_len=9, compressed_len=5, rate=3, compression="dilated_conv"),
    "most_used": Parameters(segment_len=4, mem_len=6, compressed_len=5, rate=2, compression="most_used"),
    "nothing_compressed": Parameters(segment_len=5, mem_len=5, compressed_len=0, rate=5),
}
ONE_SHOT = {name: params for name, params in FORMS.items() if params.compression != "most_used"}
LENGTH = 29
PAIRS = [
    pytest.param(impl, params, id=f"{impl}-{name}")
    for impl in ("reference", "blocked")
    for name, params in (FORMS if impl == "reference" else ONE_SHOT).items()
]
every_pair = pytest.mark.parametrize(("impl", "params"), PAIRS)
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


def build(impl: str, params: Parameters, seed: int = 0, **dims: int) -> torch.nn.Module:
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
@pytest.mark.parametrize("case", PARITY)
def test_outputs_losses_and_gradients_equal_those_of_labml_nn(impl, case):
    golden = {
        key.removeprefix(f"{case}/"): torch.from_numpy(value)
        for key, value in np.load(GOLDEN).items()
        if key.startswith(f"{case}/")
    }
    x = golden["x"].clone().requires_grad_()
    layers = 2 if case == "two_layers" else 1
    module = build(impl, PARITY[case], d_model=8, d_ff=12, num_layers=layers).train()
    module.load_state_dict({key: golden[key] for key in module.state_dict()})
    y = module(x).y
    y.backward(golden["grad"])
    found = {"y": y, "grad.x": x.grad, **{f"grad.{key}": p.grad for key, p in module.named_parameters()}}
    by_layer, inputs = [], golden["x"]
    for layer in module.layers:
        by_layer.append(torch.stack(list(layer.mixer.losses(inputs, layer.mixer.init_state(2)))))
        inputs = layer(inputs).y
    found["losses"] = sum(by_layer)
    assert len(found) == 3 + 17 * layers
    for key, value in found.items():
        scale = max(1.0, golden[key].abs().max().item())
        torch.testing.assert_close(value, golden[key], rtol=0, atol=1e-11 * scale, msg=lambda text, key=key: key + text)


def compressed(mixer: torch.nn.Module, params: Parameters, old: torch.Tensor, average: list[float]) -> list:
    """Entries of ``old: [n, d]``, each from the definition of its compression."""
    c = params.rate
    if params.compression == "most_used":
        kept = sorted(sorted(range(len(old)), key=lambda j: -average[j])[: len(old) // c])
        return [old[j] for j in kept]
    if params.compression == "dilated_conv":
        for layer, step in zip(mixer.compress.dilated, (1, 2), strict=True):
            old = conv1d(old.T, layer.weight, layer.bias, dilation=step, padding=step).T.relu()
    groups = [old[j : j + c] for j in range(0, len(old), c)]
    if params.compression == "max":
        return [group.max(dim=0).values for group in groups]
    if params.compression == "mean":
        return [group.sum(dim=0) / c for group in groups]
    conv = getattr(mixer.compress, "compress", mixer.compress)
    return [sum(conv.weight[:, :, m] @ group[m] for m in range(c)) + conv.bias for group in groups]


def oracle(module: torch.nn.Module, x: torch.Tensor, params: Parameters) -> torch.Tensor:
    """The algorithm token by token: scores of one query and one key at a time, in Python loops."""
    S, M, C = params.segment_len, params.mem_len, params.compressed_len
    for layer in module.layers:
        mixer, out = layer.mixer, torch.zeros_like(x)
        H, D = mixer.content_bias.shape
        for b in range(x.shape[0]):
            memory, entries, attention = [], [], [0.0] * x.shape[1]  # memory: tokens by number
            for begin in range(0, x.shape[1], S):
                segment = list(range(begin, min(begin + S, x.shape[1])))
                for i in segment:
                    keys = [*entries, *(x[b, j].detach() for j in memory), *(x[b, j] for j in range(begin, i + 1))]
                    for head in range(H):
                        part = slice(head * D, (head + 1) * D)
                        q, scores = mixer.q.weight[part] @ x[b, i], []
                        for place, key in enumerate(keys):
                            distance = torch.tensor([float(len(keys) - 1 - place)], dtype=torch.float64)
                            r = mixer.r.weight[part] @ sinusoids(distance, x.shape[2])[0]
                            content = (q + mixer.content_bias[head]) @ (mixer.k.weight[part] @ key)
                            scores.append((content + (q + mixer.position_bias[head]) @ r) / math.sqrt(D))
                        weights = torch.stack(scores).softmax(0)
                        out[b, i, part] = sum(
                            w * (mixer.v.weight[part] @ key) for w, key in zip(weights, keys, strict=True)
                        )
                        for j, weight in zip([*memory, *range(begin, i + 1)], weights[len(entries) :], strict=True):
                            attention[j] += float(weight.detach())
                memory += segment
                if len(segment) == S and len(memory) > M:
                    old, memory = memory[: len(memory) - M], memory[len(memory) - M :]
                    if C:
                        average = [attention[j] / (segment[-1] + 1 - j) for j in old]
                        new = compressed(mixer, params, x[b, old].detach(), average)
                        entries = [*entries, *(entry.detach() for entry in new)][-C:]
        x = layer.norm_mixer(x + mixer.o(out))
        x = layer.norm_ffn(x + layer.ffn.down(layer.ffn.up(x).relu()))
    return x


@pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
def test_reference_equals_a_loop_over_single_pairs(params):
    module, x = build("reference", params).eval(), tokens(19, batch=1)
    again = build("reference", params).eval()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(mine).y, oracle(again, theirs, params)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)
    for (name, ours), oracles in zip(module.named_parameters(), again.parameters(), strict=True):
        if "compress" in name or "decode" in name:
            assert ours.grad is None  # what the output says about the compression
            assert oracles.grad is None
        else:
            torch.testing.assert_close(ours.grad, oracles.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("params", ONE_SHOT.values(), ids=ONE_SHOT)
@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_blocked_equals_reference_with_all_gradients(params, length):
    compare_impls(params, tokens(length))


@pytest.mark.parametrize("batch", [1, 2])
def test_blocked_equals_reference_where_a_segment_has_several_blocks(batch):
    compare_impls(Parameters(segment_len=BLOCK + 2, mem_len=BLOCK, compressed_len=70, rate=2), tokens(700, batch))


def compare_impls(params: Parameters, x: torch.Tensor) -> None:
    results = []
    for impl in ("reference", "blocked"):
        module, own = build(impl, params).train(), x.clone().requires_grad_()
        y = module(own).y
        y.backward(torch.ones_like(y) + x)
        with torch.no_grad():
            without = module(x).y
        learned = [torch.zeros(()) if p.grad is None else p.grad for p in module.parameters()]
        results.append([y, without, own.grad, *learned])
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)


@every_pair
def test_streaming_equals_the_whole_sequence_for_any_cut(impl, params):
    module, x = build(impl, params), tokens()
    draw = random.Random(impl)
    with torch.no_grad():
        whole = module(x).y
        cuts = [sorted(draw.sample(range(1, LENGTH), draw.randint(1, 6))) for _ in range(2)]
        for cut in (*cuts, list(range(1, LENGTH))):
            sizes = np.diff([0, *cut, LENGTH]).tolist()
            torch.testing.assert_close(streamed(module, x, sizes).y, whole, rtol=0, atol=1e-12)


@every_pair
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
            assert all(torch.equal(a, b) for a, b in zip(old[:3], kept[:3], strict=True))
        dims = Dims(seq_len=t + 1, batch_size=2, d_model=12, num_heads=2, d_ff=16, num_layers=2)
        assert state_bytes(after) == evaluate(formula, bindings(dims, params, 8, params.segment_len))
        assert [shapes(part) for part in module.state_at(2, t + 1)] == [shapes(part) for part in after]
        state = after


def shapes(state: State) -> tuple:
    return (*((part.shape, part.dtype) for part in state[:3]), state.phase)


@every_pair
def test_outputs_depend_on_the_tokens_in_reach_and_on_no_others(impl, params):
    module, x = build(impl, params, num_layers=1, d_ff=0), tokens(26, batch=1)
    dims = Dims(seq_len=26, d_model=12, num_heads=2, num_layers=1)
    sources = [reach(dims, params, i) for i in range(26)]
    with torch.no_grad():
        plain = module(x).y[0]
        for j in range(0, 26, 2):
            moved = x.clone()
            moved[0, j] += 3.0
            differs = (module(moved).y[0] - plain).abs().amax(dim=1) > 1e-11
            changed = {i for i in range(26) if differs[i]}
            within = {i for i in range(26) if j in sources[i]}
            assert changed <= within
            if params.compression in ("conv", "mean"):
                assert changed == within


@impls
def test_memories_pass_gradients_to_weights_and_none_to_earlier_segments(impl):
    params = Parameters(segment_len=4, mem_len=4, compressed_len=4, rate=2)
    module, x = build(impl, params, num_layers=1).train(), tokens(16).requires_grad_()
    module(x).y[:, 12:].square().sum().backward()
    assert not x.grad[:, :12].any()
    assert x.grad[:, 12:].abs().amin(dim=(0, 2)).gt(0).all()
    alone = build(impl, params.replace(compressed_len=0), num_layers=1)
    alone(tokens(16)).y[:, 12:].square().sum().backward()
    gradients = dict(module.named_parameters())
    for name in ("k", "v", "r"):
        key = f"layers.0.mixer.{name}.weight"
        assert not torch.allclose(gradients[key].grad, dict(alone.named_parameters())[key].grad)


@pytest.mark.parametrize("auxiliary", ["attention_reconstruction", "auto_encoding"])
def test_losses_reach_their_compression_alone_and_fall(auxiliary):
    params = Parameters(segment_len=4, mem_len=4, compressed_len=4, rate=2, auxiliary=auxiliary)
    mixer, x = build("reference", params).layers[0].mixer, tokens(24).requires_grad_()
    sum(mixer.losses(x.detach(), mixer.init_state(2))).backward()
    trained = {name for name, parameter in mixer.named_parameters() if parameter.grad is not None}
    decoder = {"decode.weight", "decode.bias"} if auxiliary == "auto_encoding" else set()
    assert trained == {"compress.weight", "compress.bias"} | decoder
    evaluated = build("blocked", params).eval()
    evaluated(tokens()).y.sum().backward()
    assert all(p.grad is None for name, p in evaluated.named_parameters() if "compress" in name or "decode" in name)
    old, queries = x[:, :4], x[:, 4:8]
    loss = (
        auto_encoding(mixer.decode, old, mixer.compress(old.detach()))
        if decoder
        else attention_reconstruction(mixer, queries, old, mixer.compress(old.detach()))
    )
    assert torch.autograd.grad(loss, x, allow_unused=True) == (None,)
    module = build("blocked", params).train()
    compression = [p for name, p in module.named_parameters() if "compress" in name or "decode" in name]
    optimiser, seen = torch.optim.Adam(compression, lr=0.02), []
    for _ in range(8):
        optimiser.zero_grad()
        module(tokens(24)).y.sum().backward()  # of the loss above the layers' outputs are constants
        optimiser.step()
        losses = module.layers[0].mixer.losses(tokens(24), mixer.init_state(2))
        seen.append(sum(loss.item() for loss in losses))
    assert seen[-1] < 0.9 * seen[0]


def test_reconstruction_is_attention_by_content_alone():
    params = Parameters(segment_len=4, mem_len=4, compressed_len=4, rate=2)
    mixer, x = build("reference", params).layers[0].mixer, tokens(8)
    old, queries, entries = x[:, :4], x[:, 4:], mixer.compress(x[:, :4])
    squares = []
    for b in range(2):
        for head in range(2):
            part = slice(6 * head, 6 * head + 6)
            for i in range(4):
                q, read = mixer.q.weight[part] @ queries[b, i], []
                for rows in (old[b], entries[b]):
                    weights = torch.stack([q @ (mixer.k.weight[part] @ row) / math.sqrt(6) for row in rows]).softmax(0)
                    read.append(sum(w * (mixer.v.weight[part] @ row) for w, row in zip(weights, rows, strict=True)))
                squares += (read[0] - read[1]).square()
    expected = sum(squares) / len(squares)
    torch.testing.assert_close(attention_reconstruction(mixer, queries, old, entries), expected, rtol=1e-12, atol=0)


def test_most_used_keeps_the_order_of_tokens():
    old = torch.arange(12.0).view(1, 6, 2)
    kept = most_used(old, torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.8, 0.7]]), 2)
    assert kept[0, :, 0].tolist() == [2.0, 8.0, 10.0]


def test_most_used_is_refused_where_segments_are_computed_at_once():
    answer = METHOD.impl_support(METHOD.impl("blocked"), "forward", Dims(seq_len=8), FORMS["most_used"], "cpu", "fp32")
    assert not answer.ok
    assert "follow one another" in answer.reason


@pytest.mark.parametrize("changes", [{"segment_len": 5}, {"mem_len": 7}])
def test_sizes_are_multiples_of_the_rate(changes):
    with pytest.raises(ValueError, match="must be a multiple of rate"):
        Parameters(**{"segment_len": 4, "mem_len": 4, "rate": 2, **changes})


@pytest.mark.parametrize(("known", "past", "phase"), [(0, 0, 0), (0, 5, 1), (3, 9, 3), (7, 6, 0)])
def test_blocks_see_the_last_entries_that_exist(known, past, phase):
    segment_len, mem_len, far = 6, 6, Far(known, 7, 3)
    for block in blocks(61, past, phase, segment_len, mem_len, heads=1, slab=200, far=far):
        for segment in range(block.count):
            begin = block.first + segment * block.rows
            left = max(0, past + begin - (phase + begin) % segment_len - mem_len)
            entries = known + left // 3
            assert block.far == min(7, entries)
            assert block.first_far + segment * block.far_step == entries - block.far
            assert block.first_key + segment * block.rows == left - past


COUNTED = {
    "overlapping": (FORMS["conv"], (1, 17, 48), METHOD.modes),
    "several_blocks": (Parameters(segment_len=150, mem_len=150, compressed_len=70, rate=2), (481,), METHOD.modes),
    "tokens": (FORMS["every_token"], (2, 9), ("forward", "stream")),
    "decoder": (FORMS["auto_encoding"], (31,), ("train",)),
    "dilated": (FORMS["dilated_conv"], (30,), ("train",)),
    "usage": (FORMS["most_used"], (41,), ("stream", "decode")),
    "few_entries": (FORMS["few_entries"], (31,), ("forward", "decode")),
}


@pytest.mark.parametrize(
    ("impl", "name", "mode"),
    [
        (impl, name, mode)
        for name, (params, _, modes) in COUNTED.items()
        for mode in modes
        for impl in ("reference", "blocked")
        if impl == "reference" or params in ONE_SHOT.values() or name == "several_blocks"
    ],
)
def test_formulas_equal_what_is_counted(impl, name, mode):
    params, lengths, _ = COUNTED[name]
    formula = METHOD.cost_of(impl, mode, True, "transformer_xl", params)
    for length in lengths:
        dims = Dims(seq_len=length, batch_size=2, d_model=32, num_heads=4, num_layers=1, d_ff=48)
        counted = trace(METHOD, dims, params, impl, mode)
        values = bindings(dims, params, 4, params.segment_len)
        assert evaluate(total(formula.flops), values) == counted.flops
        assert evaluate(formula.num_parameters, values) == counted.num_parameters
        assert not counted.uncounted
        if counted.state_bytes is not None:
            assert evaluate(formula.state_bytes, values) == counted.state_bytes


PEAKS = {
    "conv": Parameters(segment_len=384, mem_len=1024, compressed_len=300),
    "most_used": Parameters(compression="most_used"),
    "nothing_compressed": Parameters(compressed_len=0),
}


@pytest.mark.parametrize(
    ("impl", "name", "mode"),
    [
        ("reference", "conv", "forward"), ("blocked", "conv", "forward"), ("blocked", "conv", "decode"),
        ("blocked", "nothing_compressed", "stream"), ("reference", "most_used", "decode"),
    ],
)  # fmt: skip
def test_peak_formula_is_within_three_percent(impl, name, mode):
    params, dims = PEAKS[name], Dims(seq_len=4133, batch_size=2, num_layers=2, d_ff=512)
    values = bindings(dims, params, 4, params.segment_len)
    formula = evaluate(METHOD.cost_of(impl, mode, True, "transformer_xl", params).peak_bytes, values)
    assert formula == pytest.approx(trace(METHOD, dims, params, impl, mode).peak_bytes, rel=0.03)
