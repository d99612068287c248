"""Compressive memory: a loop over single pairs, what reaches the compression, streaming, counts, and the sketch."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations.compressive_memory import METHOD
from ctxbench.implementations.compressive_memory.as_written import SketchMemory
from ctxbench.implementations.compressive_memory.layer import State
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams as Parameters
from ctxbench.implementations.compressive_memory.params import reach
from ctxbench.method import Dims
from ctxbench.workload import map_state, prepare, state_bytes

FORMS = {
    "preferred": Parameters(segment_len=8, recent_len=8, compressed_len=6, item_len=2, rate=4, top_k=3),
    "reads_both": Parameters(segment_len=8, recent_len=8, compressed_len=6, item_len=2, rate=2, top_k=5),
    "reads_all": Parameters(segment_len=4, recent_len=8, compressed_len=4, item_len=2, rate=1, top_k=9),
    "only_compressed": Parameters(segment_len=4, recent_len=0, compressed_len=8, item_len=1, rate=2, top_k=3),
    "only_recent": Parameters(segment_len=8, recent_len=4, compressed_len=0, item_len=2, rate=2, top_k=2),
    "few_of_a_segment": Parameters(segment_len=8, recent_len=4, compressed_len=3, item_len=1, rate=2, top_k=2),
    "grows": Parameters(segment_len=4, recent_len=4, compressed_len=40, item_len=2, rate=2, top_k=9),
}
LENGTH = 43
forms = pytest.mark.parametrize("params", FORMS.values(), ids=FORMS)
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


def build(impl: str, params: Parameters, **dims: int | str) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = Dims(**{"seq_len": LENGTH, "d_model": 12, "num_heads": 2, "d_ff": 16, "num_layers": 2, **dims})
    return METHOD.make(sizes, params, impl, "cpu", torch.float64)


def tokens(length: int = LENGTH, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 12, generator=generator, dtype=torch.float64)


def turned(vector: torch.Tensor, place: int) -> torch.Tensor:
    """Channels n and n + D/2 as a complex number, turned by ``place * 10000^(-2 n / D)``."""
    half = len(vector) // 2
    angles = place * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat((number.real, number.imag))


def by_distance(position: str, table: torch.Tensor | None, head: int, away: int) -> torch.Tensor | float:
    """What is added to the score of a key ``away`` tokens before its query, of two heads, as the papers say."""
    if position == "alibi":
        return -(2.0 ** (-4 * (head + 1))) * away
    if table is None:
        return 0.0
    bucket = away if away < 16 else min(31, 16 + int(math.log(away / 16) / math.log(128 / 16) * 16))
    return table[bucket, head]


def oracle(module: torch.nn.Module, x: torch.Tensor, params: Parameters, position: str) -> torch.Tensor:
    """The equations for one sequence ``[T, d]``: items as lists of rows with the token each stands at, counted from
    the sequence's beginning; one query and one key at a time.
    """
    S, n, c = params.segment_len, params.item_len, params.rate
    for layer in module.layers:
        mixer, H = layer.mixer, layer.mixer.num_heads
        table = mixer.position.table.weight if position == "t5" else None
        D = x.shape[1] // H
        a, out = layer.norm_mixer(x), torch.zeros_like(x)
        recent, compressed, found = [], [], []
        for begin in range(0, len(x), S):
            if begin:
                segment = [(a[j].detach(), j) for j in range(begin - S, begin)]
                recent += [segment[j : j + n] for j in range(0, S, n)]
                while len(recent) > params.recent_len // n:
                    rows = [row for item in recent[:c] for row in item]
                    recent = recent[c:]
                    if params.compressed_len:
                        groups = [rows[j : j + c] for j in range(0, c * n, c)]
                        made = [(mixer.compress(torch.cat([row for row, _ in g])), g[-1][1]) for g in groups]
                        compressed = [*compressed, made][-(params.compressed_len // n) :]
                asked = mixer.question.weight @ (sum(row for row, _ in segment) / S)
                items = compressed + recent
                means = [sum(row for row, _ in item) / n for item in items]
                cosines = [asked @ mean / (asked.norm() * mean.norm()) for mean in means]
                best = sorted(range(len(items)), key=lambda j: -cosines[j].item())[: params.top_k]
                weights = {j: torch.sigmoid(mixer.gate[0] * cosines[j] + mixer.gate[1]) for j in best}
                found = [(row, place, weights[j]) for j in best for row, place in items[j]]
            for i in range(begin, min(begin + S, len(x))):
                keys = [*found, *((a[j], j, 1.0) for j in range(begin, i + 1))]
                for head in range(H):
                    part = slice(head * D, (head + 1) * D)
                    q = mixer.q.weight[part] @ a[i]
                    k = [mixer.k.weight[part] @ row for row, _, _ in keys]
                    if position == "rope":
                        q, k = turned(q, i), [turned(key, place) for key, (_, place, _) in zip(k, keys, strict=True)]
                    added = [by_distance(position, table, head, i - place) for _, place, _ in keys]
                    scores = torch.stack([q @ key / math.sqrt(D) + b for key, b in zip(k, added, strict=True)])
                    values = [weight * (mixer.v.weight[part] @ row) for row, _, weight in keys]
                    out[i, part] = sum(p * value for p, value in zip(scores.softmax(0), values, strict=True))
        x = x + mixer.o(out)
        x = x + layer.ffn(layer.norm_ffn(x))
    return x


def settings(*positions: str, biased: tuple[str, ...] = ("reads_both", "only_compressed")) -> list[Any]:
    """Every form with each position, but biases with a few alone."""
    cases = [(name, position) for position in positions for name in FORMS]
    cases += [(name, position) for position in ("t5", "alibi") for name in biased]
    return [pytest.param(FORMS[name], position, id=f"{name}-{position}") for name, position in cases]


@pytest.mark.parametrize(("params", "position"), settings("none", "rope"))
def test_reference_equals_a_loop_over_single_pairs(params, position):
    module, again = (build("reference", params, position=position) for _ in range(2))
    x = tokens(27, batch=1)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = module(mine).y, oracle(again, theirs[0], params, position)[None]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    (y * x.cos()).sum().backward()
    (expected * x.cos()).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)
    assert len(list(module.parameters())) == 2 * (4 + 1 + 1 + 8 + 4 * (params.compressed_len > 0)) + (position == "t5")
    for ours, oracles in zip(module.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(gradient(ours), gradient(oracles), rtol=0, atol=1e-10)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Zeros for a compression of which no entry was retrieved."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@forms
@pytest.mark.parametrize(
    ("length", "position"), [(1, "none"), (2, "none"), (8, "none"), (LENGTH, "none"), (LENGTH, "rope")]
)
def test_blocked_equals_reference_with_all_gradients(params, length, position):
    x, results = tokens(length), []
    for impl in ("reference", "blocked"):
        module, own = build(impl, params, position=position), x.clone().requires_grad_()
        y = module(own).y
        y.backward(torch.ones_like(y) + x)
        with torch.no_grad():
            without = module(x).y
        gradients = [gradient(parameter) for parameter in module.parameters()]
        results.append([y, without, own.grad, *gradients])
    for reference, found in zip(*results, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)


@impls
@pytest.mark.parametrize(("params", "position"), settings("none", "rope", biased=("few_of_a_segment",)))
def test_streaming_equals_the_whole_sequence_for_any_cut(impl, params, position):
    module, x = build(impl, params, position=position), tokens()
    draw = random.Random(impl)
    with torch.no_grad():
        whole = module(x).y
        cuts = [sorted(draw.sample(range(1, LENGTH), draw.randint(1, 6))) for _ in range(2)]
        for cut in (*cuts, list(range(1, LENGTH))):
            state, outputs = module.init_state(2), []
            for chunk in x.split(np.diff([0, *cut, LENGTH]).tolist(), dim=1):
                y, state = module(chunk, state)
                outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-12)


@impls
@pytest.mark.parametrize(("params", "position"), settings("none", biased=("few_of_a_segment",)))
def test_state_has_the_declared_size_after_every_token_and_is_a_value(impl, params, position):
    module, x = build(impl, params, position=position), tokens()
    formula = METHOD.cost_of(impl, "stream", True, position, params).state_bytes
    state = module.init_state(2)
    for t in range(LENGTH):
        before = map_state(torch.clone, state)
        with torch.no_grad():
            y, after = module(x[:, t : t + 1], state)
            again = module(x[:, t : t + 1], state).y
        torch.testing.assert_close(y, again, rtol=0, atol=0)
        for old, same in zip(before, state, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(old[:4], same[:4], strict=True))
        dims = Dims(seq_len=t + 1, batch_size=2, d_model=12, num_heads=2, d_ff=16, num_layers=2)
        assert state_bytes(after) == evaluate(formula, bindings(dims, params, 8, params.segment_len))
        assert [shapes(part) for part in module.state_at(2, t + 1)] == [shapes(part) for part in after]
        assert not any(tensor.requires_grad for part in module(x[:, t : t + 1], state).state for tensor in part[:4])
        state = after


def shapes(state: State) -> tuple:
    return (*((part.shape, part.dtype) for part in state[:5] if part is not None), state.tokens)


@impls
@forms
def test_no_output_depends_on_tokens_out_of_reach(impl, params):
    module, x = build(impl, params, d_ff=0), tokens(40, batch=1)
    dims = Dims(seq_len=40, d_model=12, num_heads=2, num_layers=2)
    with torch.no_grad():
        plain, connected = module(x).y[0], 0
        for j in range(0, 40, 3):
            moved = x.clone()
            moved[0, j] = -3.0 * x[0, j]
            changed = (module(moved).y[0] - plain).abs().amax(dim=1) > 1e-11
            assert changed[j]
            assert all(j in reach(dims, params, i) for i in range(40) if changed[i])
            connected += int(changed[j - j % params.segment_len + params.segment_len :].sum())
    assert connected > 20  # pairs in different segments


@impls
def test_outputs_train_compression_question_and_gate_but_no_earlier_token(impl):
    module, x = build(impl, FORMS["reads_both"], num_layers=1), tokens().requires_grad_()
    module(x).y[:, 40:].square().sum().backward()
    assert not x.grad[:, :40].any()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_retrieval_finds_what_is_most_similar():
    params = FORMS["preferred"]
    mixer = build("reference", params).layers[0].mixer
    with torch.no_grad():
        mixer.question.weight.copy_(torch.eye(12))
    items = tokens(12).view(2, 6, 2, 12)
    question = torch.stack((items[0, 4].mean(0), -items[1, 1].mean(0)))
    found, weight, chosen = mixer.retrieve(question, items, items.mean(dim=2))
    assert 4 in chosen[0]
    assert 1 not in chosen[1]
    assert found.shape == (2, 3, 2, 12)
    assert any(torch.equal(item, items[0, 4]) for item in found[0])
    assert not any(torch.equal(item, items[1, 1]) for item in found[1])
    torch.testing.assert_close(weight[0].max(), torch.sigmoid(torch.tensor(4.0, dtype=torch.float64)))


@pytest.mark.parametrize("mode", METHOD.modes)
@impls
@forms
def test_formulas_equal_what_is_counted(params, impl, mode):
    formula = METHOD.cost_of(impl, mode, True, "none", params)
    for length in (LENGTH, 7):
        dims = Dims(seq_len=length, batch_size=2, d_model=16, num_heads=4, num_layers=1, d_ff=24)
        work = prepare(METHOD, dims, params, impl, mode, "fp32", rotate=1)
        with Meter() as meter:
            work.call()
        values, counted = bindings(dims, params, 4, params.segment_len), meter.result()
        assert evaluate(total(formula.flops), values) == counted.flops
        assert sum(p.numel() for p in work.module.parameters()) == evaluate(formula.num_parameters, values)
        assert not counted.uncounted


@pytest.mark.parametrize(
    ("impl", "mode", "length"),
    [
        ("reference", "forward", 4133), ("reference", "train", 4133), ("reference", "stream", 4607),
        ("reference", "decode", 4500), ("reference", "decode", 4607), ("blocked", "forward", 4133),
        ("blocked", "stream", 4607), ("blocked", "decode", 4607),
    ],
)  # fmt: skip
def test_peak_formula_is_within_three_percent(impl, mode, length):
    params = Parameters(segment_len=256, recent_len=1024, compressed_len=320, item_len=32, top_k=40)
    dims = Dims(seq_len=length, batch_size=2, num_layers=2, d_ff=512)
    values = bindings(dims, params, 4, params.segment_len)
    formula = evaluate(METHOD.cost_of(impl, mode, True, "none", params).peak_bytes, values)
    assert formula == pytest.approx(trace(METHOD, dims, params, impl, mode).peak_bytes, rel=0.03)


@pytest.mark.parametrize("length", [4096, 8192])
def test_peak_formula_of_kernels_holds_without_a_network_that_hides_it(length):
    params, dims = Parameters(), Dims(seq_len=length, d_model=128, num_heads=4, num_layers=2, d_ff=0)
    cost = METHOD.cost_of("native", "forward", True, "none", params)
    formula = evaluate(cost.peak_bytes, bindings(dims, params, 4, params.segment_len))
    assert formula == pytest.approx(trace(METHOD, dims, params, "native", "forward").peak_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segment_len": 12}, "segment_len must be a multiple of item_len times rate"),
        ({"compressed_len": 7}, "compressed_len must be a multiple of item_len"),
        ({"recent_len": 0, "compressed_len": 0}, "must not both be 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        FORMS["preferred"].replace(**changes)


def sketch(capacity: int = 12, rate: int = 2) -> SketchMemory:
    torch.manual_seed(0)
    return SketchMemory(12, capacity, rate, top_k=2).double()


def test_sketch_crashes_where_fewer_blocks_are_recent_than_are_merged():
    memory = sketch(capacity=8, rate=4)
    memory.add(tokens(2))
    memory.add(tokens(2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        memory.add(tokens(2))


def test_sketch_cannot_merge_blocks_of_unequal_length():
    memory = sketch(capacity=4)
    memory.add(tokens(2))
    memory.add(tokens(3))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        memory.add(tokens(2))


def test_sketch_counts_blocks_and_merges_tokens_a_block_apart():
    memory, x = sketch(capacity=4), tokens(300)
    for block in x.split(100, dim=1):
        memory.add(block)
    assert sum(block.shape[1] for block in memory.recent + memory.compressed) == 200  # of a capacity of 4
    first = memory.compressor(torch.cat((x[:, 0], x[:, 100]), dim=1))
    torch.testing.assert_close(memory.compressed[0][:, 0], first)


SKETCH = Parameters(segment_len=8, recent_len=8, compressed_len=56, item_len=2, rate=2, top_k=3)


def test_sketch_keeps_graphs_so_that_a_second_step_fails():
    module, x = build("as_written", SKETCH), tokens(30)
    module(x).sum().backward()
    assert module.layers[1].mixer.memory.recent[0].grad_fn is not None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        module(x).sum().backward()


def test_sketch_gives_its_question_no_gradient():
    memory, x = sketch(), tokens(6)
    for block in x.split(2, dim=1):
        memory.add(block)
    query = tokens(4).requires_grad_()
    assert not memory.retrieve(query).requires_grad


def test_sketch_returns_the_most_similar_block_first():
    memory, x = sketch(), tokens(6)
    for block in x.split(2, dim=1):
        memory.add(block)
    assert torch.equal(memory.retrieve(x[:, 2:4])[:, :2], x[:, 2:4])


def test_sketch_remembers_earlier_calls_and_chooses_for_all_rows_at_once():
    module, x = build("as_written", SKETCH), tokens(30)
    with torch.no_grad():
        first, second = module(x), module(x)
        assert not torch.allclose(first, second)
        alone = [build("as_written", SKETCH)(row) for row in x.split(1)]
    assert not torch.allclose(torch.cat(alone), first)


def test_sketch_cannot_return_blocks_of_two_batch_sizes():
    memory = sketch()
    memory.add(tokens(2))
    memory.add(tokens(2, batch=1))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        memory.retrieve(tokens(2))


def test_sketch_asks_with_later_tokens():
    x = tokens(30)
    moved = x.clone()
    moved[:, -1] *= -9.0
    with torch.no_grad():
        plain, other = (build("as_written", SKETCH)(each) for each in (x, moved))
    assert (plain[:, 0] - other[:, 0]).abs().max() > 1e-6
