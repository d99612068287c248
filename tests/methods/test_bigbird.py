"""BigBird against the published code, brute-force pair counts, and the laws of the plan of blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.bigbird import METHOD, blocked, native, reference
from ctxbench.implementations.bigbird.cost import visible_pairs
from ctxbench.implementations.bigbird.layer import Plan
from ctxbench.implementations.bigbird.params import BigBirdParams, random_numbers
from ctxbench.method import Dims
from ctxbench.testing import Case
from ctxbench.testing.agreement import agreement
from ctxbench.testing.behaviour import any_length, receptive_field
from ctxbench.testing.costs import flops_equal_formula
from ctxbench.testing.gradients import gradcheck

GOLDEN = Path(__file__).parents[1] / "golden" / "bigbird.npz"
CASES = ("most_blocks_unseen", "one_random", "blocks_of_one")
OPERATORS = {"reference": reference.attend, "blocked": blocked.attend, "native": native.attend}
SPARSE = {  # sizes at which most blocks are not seen; the kit's own have too few blocks
    "whole blocks": (BigBirdParams(block_size=4, num_random=1), 48),
    "short last block": (BigBirdParams(block_size=4, num_random=2), 53),
    "no random blocks": (BigBirdParams(block_size=3, num_random=0), 31),
    "early random blocks": (BigBirdParams(block_size=2, num_random=1, random_within=5), 29),
}


def sparse_case(name: str, impl: str) -> Case:
    params, length = SPARSE[name]
    dims = Dims(seq_len=length, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=32, causal=False)
    return Case(METHOD, impl, params, dims, METHOD.modes, label=name)


def given_plan(size: int, blocks: int, drawn: torch.Tensor) -> Plan:
    """The plan with random blocks ``drawn: [H, blocks - 2, r]`` for the rows between the first and the last."""
    rows = [
        [
            sorted({0, row - 1, row, row + 1, blocks - 1, *map(int, drawn[head, row - 1])})
            for row in range(1, blocks - 1)
        ]
        for head in range(len(drawn))
    ]
    edges = torch.tensor([[head[0], head[-1]] for head in rows])
    return Plan(size, blocks, edges, torch.tensor([head[1:-1] for head in rows]))


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_attention(name: str, impl: str) -> None:
    """Outputs and gradients of the package transformers, with the blocks that it drew."""
    with np.load(GOLDEN) as arrays:
        golden = {key.removeprefix(f"{name}/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(name)}
    size, blocks, _ = golden["sizes"].tolist()
    leaves = {key: golden[key].requires_grad_() for key in golden if f"grad.{key}" in golden}
    x = leaves["x"]
    heads = [
        linear(x, leaves[f"{part}.weight"], leaves[f"{part}.bias"]).unflatten(2, (2, -1)).transpose(1, 2)
        for part in ("q", "k", "v")
    ]
    y = OPERATORS[impl](*heads, given_plan(size, blocks, golden["random"])).transpose(1, 2).flatten(2)
    y.backward(golden["grad"])
    torch.testing.assert_close(y, golden["y"], rtol=0, atol=1e-14)
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, golden[f"grad.{key}"], rtol=0, atol=1e-13, msg=key)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("law", [agreement, any_length, receptive_field, flops_equal_formula, gradcheck], ids=str)
def test_laws_hold_where_most_blocks_are_not_seen(law, name: str, impl: str) -> None:
    law(sparse_case(name, impl))


def by_brute_force(params: BigBirdParams, length: int, layer: int = 0, head: int = 0) -> int:
    plan, size = params.pattern(length).sees(layer, head), params.block_size
    return sum(key // size in plan[query // size] for query in range(length) for key in range(length))


@pytest.mark.parametrize("num_random", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 11, 12, 15, 16, 17, 20, 23, 24, 28, 31, 32, 36, 37, 60, 61])
def test_pairs_equal_a_count_one_by_one(length: int, num_random: int) -> None:
    params = BigBirdParams(block_size=4, num_random=num_random)
    values = bindings(Dims(seq_len=length, causal=False), params, 4, 512)
    expected = {by_brute_force(params, length, layer, head) for layer, head in ((0, 0), (1, 3))}
    assert {evaluate(visible_pairs(), values)} == expected


@pytest.mark.parametrize("length", [64 * n for n in (8, 9, 64, 2048)])
def test_pairs_of_whole_blocks_have_the_textbook_form(length: int) -> None:
    n, r = length // 64, 3
    values = bindings(Dims(seq_len=length, causal=False), BigBirdParams(), 4, 512)
    assert evaluate(visible_pairs(), values) == 64**2 * (n * (7 + r) - 12 - 2 * r)


def test_pairs_at_the_published_size() -> None:
    """4,096 tokens in blocks of 64 with three random ones: 622 keys a query, 7.827 GFLOP at d = 768."""
    dims = Dims(seq_len=4096, d_model=768, num_heads=12, causal=False)
    values = bindings(dims, BigBirdParams(), 4, 512)
    assert evaluate(visible_pairs(), values) == 2_547_712 == 4096 * 622
    cost = METHOD.cost_of("blocked", "forward", False, "none", BigBirdParams())
    assert evaluate(cost.flops["attention"], values) == 4 * 768 * 2_547_712
    assert cost.flops == cost.algorithmic  # every executed pair is a visible one


@pytest.mark.parametrize("blocks", [3, 4, 5, 6, 9, 40])
@pytest.mark.parametrize("num_random", [0, 3, 7])
def test_rows_see_ends_window_and_distinct_random_blocks(blocks: int, num_random: int) -> None:
    pattern = BigBirdParams(block_size=2, num_random=num_random).pattern(2 * blocks - 1)
    for layer, head in itertools.product(range(2), range(3)):
        plan = pattern.sees(layer, head)
        assert plan[0] == plan[-1] == tuple(range(blocks))
        for row, columns in enumerate(plan[1:-1], start=1):
            must = {0, row - 1, row, row + 1, blocks - 1}
            assert list(columns) == sorted(set(columns))
            assert must <= set(columns) <= set(range(blocks))
            assert len(columns) == len(must) + min(num_random, blocks - len(must))


def test_random_blocks_depend_on_seed_layer_head_and_nothing_else() -> None:
    params = BigBirdParams(block_size=1)
    plans = {
        (seed, layer, head): params.replace(seed=seed).pattern(64).sees(layer, head)
        for seed, layer, head in itertools.product(range(3), repeat=3)
    }
    assert len(set(plans.values())) == len(plans)
    torch.manual_seed(0)
    module = METHOD.make(Dims(seq_len=64, num_layers=2, causal=False), params, "blocked", "cpu", torch.float32)
    torch.manual_seed(1)
    again = METHOD.make(Dims(seq_len=64, num_layers=2, causal=False), params, "reference", "cpu", torch.float32)
    for layer in range(2):
        assert torch.equal(module.layers[layer].mixer.inner, again.layers[layer].mixer.inner)
        assert module.layers[layer].mixer.inner[2].tolist() == [list(row) for row in plans[0, layer, 2][2:-2]]


def test_random_numbers_are_the_same_on_every_machine() -> None:
    """The first output for state 0 is SplitMix64's published 16294208416658607535; keys are hashed into the state."""
    from ctxbench.implementations.bigbird.params import _mix

    assert _mix(0x9E3779B97F4A7C15) == 16294208416658607535
    assert list(itertools.islice(random_numbers(0, 0, 0), 2)) == list(itertools.islice(random_numbers(0, 0, 0), 2))
    assert len({next(random_numbers(*key)) for key in itertools.product(range(8), repeat=3)}) == 512


def test_every_free_block_is_drawn_equally_often() -> None:
    """Pearson's statistic of 25 free blocks, 24 degrees of freedom: beyond 52 once in a thousand times."""
    pattern, row = BigBirdParams(block_size=1, num_random=3).pattern(30), 11
    fixed = set(pattern.fixed(row))
    counts = Counter(column for head in range(2000) for column in set(pattern.sees(0, head)[row]) - fixed)
    assert set(counts) == set(range(30)) - fixed
    expected = 3 * 2000 / 25
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 52


def test_random_blocks_can_be_kept_to_the_first_ones() -> None:
    """Published code: 2 r + 4 blocks, so that distant blocks meet through the ends alone."""
    params = BigBirdParams(block_size=1, num_random=3, random_within=10)
    for head in range(4):
        for row, columns in enumerate(params.pattern(40).sees(0, head)[1:-1], start=1):
            drawn = set(columns) - {0, row - 1, row, row + 1, 39}
            assert drawn <= set(range(1, 10))
            assert len(drawn) == 3
    assert params.pattern(10).sees(0, 0) == params.replace(random_within=0).pattern(10).sees(0, 0)
    with pytest.raises(ValueError, match=r"at least num_random \+ 4 = 7, received 6"):
        params.replace(random_within=6)


@pytest.mark.parametrize("impl", OPERATORS)
def test_a_built_plan_refuses_another_length(impl: str) -> None:
    module = METHOD.make(Dims(seq_len=40, causal=False), BigBirdParams(block_size=4), impl, "cpu", torch.float32)
    with pytest.raises(ValueError, match="for 40 tokens, received 44"):
        module(torch.randn(1, 44, 256))


@pytest.mark.parametrize("mode", ["stream", "decode"])
def test_there_is_nothing_to_continue(mode: str) -> None:
    answer = METHOD.mode_support(mode, Dims(seq_len=40, causal=False), BigBirdParams())
    assert not answer
    assert "first block sees all later tokens" in answer.reason


@pytest.mark.parametrize("blocks", [(300, 3), (300, 5), (260, 9)], ids=["3 blocks", "5 blocks", "9 blocks"])
def test_blocks_longer_than_a_slab_are_cut(blocks: tuple[int, int]) -> None:
    """Rows of one block share their keys; only so many of its queries have scores at a time."""
    size, count = blocks
    dims = Dims(seq_len=size * count - 7, d_model=8, num_heads=2, d_ff=0, causal=False)
    case = Case(METHOD, "blocked", BigBirdParams(block_size=size, num_random=2), dims, METHOD.modes)
    results = []
    for impl in OPERATORS:
        module, x = case.build("fp64", impl), torch.linspace(-1, 1, dims.seq_len * 8, dtype=torch.float64).sin()
        x = x.view(1, -1, 8).clone().requires_grad_()
        y = module(x).y
        y.square().sum().backward()
        results.append((y, x.grad, *(parameter.grad for parameter in module.parameters())))
    for expected, *others in zip(*results, strict=True):
        for seen in others:
            torch.testing.assert_close(seen, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("size", "width", "batch"), [(1, 3, 1), (7, 20, 2), (64, 64, 1), (70, 33, 1), (130, 16, 2)])
def test_panels_hold_any_block_and_head(size: int, width: int, batch: int) -> None:
    """Blocks of several panels, heads and panels that no vector divides, rows that are not in one piece."""
    generator = torch.Generator().manual_seed(size)
    blocks, heads = 7, 2
    plan = given_plan(size, blocks, torch.tensor([[3, 4, 1, 1, 1], [5, 5, 5, 2, 3]])[:, :, None])
    length = size * blocks - size // 2
    q, k, v = torch.randn(3, batch, heads, width, length, generator=generator, dtype=torch.float64).transpose(3, 4)
    q = q * 20  # maxima that later panels raise
    expected = reference.attend(q, k, v, plan)
    assert (native.attend(q, k, v, plan) - expected).abs().max() < 1e-12
    seen = native.attend(*(x.float() for x in (q, k, v)), plan)
    assert (seen - expected).abs().max() < 3e-5
    assert seen.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("params", "dtype", "reason"),
    [({"form": "etc"}, "fp32", "a window and a prefix"), ({}, "bf16", "multiplies in fp32 and fp64")],
)
def test_native_says_what_it_does_not_take(params: dict, dtype: str, reason: str) -> None:
    dims = Dims(seq_len=640, causal=False)
    answer = METHOD.impl_support(METHOD.impl("native"), "forward", dims, BigBirdParams(**params), "cpu", dtype)
    assert not answer
    assert reason in answer.reason


@pytest.mark.parametrize("position", ["none", "t5"])
def test_global_rows_are_computed_in_parts(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of queries that the last block continues, of fewer heads than there are."""
    monkeypatch.setattr(blocked, "END", 3)
    monkeypatch.setattr(blocked, "END_SCORES", 1)
    params, length = BigBirdParams(block_size=4, num_random=1), 46
    for rows, heads in ((2, 3), (3, 1)):
        parts = list(blocked.ends(Plan(4, 12, torch.empty(0), torch.empty(0)), rows, heads, length))
        seen = Counter(
            (row, head, token)
            for end in parts
            for row in range(rows)[end.part.rows]
            for head in range(heads)[end.part.heads]
            for tokens in end.tokens
            for token in range(length)[tokens]
        )
        assert seen == Counter(itertools.product(range(rows), range(heads), [0, 1, 2, 3, 44, 45]))
        assert max(end.queries for end in parts) == parts[0].queries == 2 * 3
        dims = Dims(
            seq_len=length, batch_size=rows, d_model=4 * heads, num_heads=heads, causal=False, position=position
        )
        agreement(Case(METHOD, "blocked", params, dims, METHOD.modes))


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize(
    ("changes", "params"),
    [
        ({"d_ff": 0}, {}),
        ({"num_layers": 3, "batch_size": 2}, {}),
        ({"num_layers": 2, "d_ff": 0}, {"block_size": 16, "num_random": 1}),
        ({"d_ff": 0}, {"block_size": 300}),
        ({"d_ff": 0}, {"block_size": 2000}),
    ],
    ids=["no FFN", "three layers", "small blocks", "long blocks", "one block"],
)
def test_peak_formula_is_exact_at_other_shapes(mode: str, impl: str, changes: dict, params: dict) -> None:
    dims = Dims(seq_len=1411, d_model=64, num_heads=4, d_ff=256, causal=False).replace(**changes)
    chosen = BigBirdParams(**params)
    cost = METHOD.cost_of(impl, mode, False, "none", chosen)
    formula = evaluate(cost.peak_bytes, bindings(dims, chosen, 4, 512))
    assert trace(METHOD, dims, chosen, impl, mode).peak_bytes == pytest.approx(formula, rel=2e-3)


def test_blocked_grows_linearly_and_keeps_no_square() -> None:
    for mode in METHOD.modes:
        cost = METHOD.cost_of("blocked", mode, False, "none", BigBirdParams())
        assert big_o(total(cost.flops)) == big_o(cost.peak_bytes) == "O(T)"
    dims = Dims(seq_len=8192, d_model=64, num_heads=4, d_ff=0, causal=False)
    lengths = [dataclasses.replace(dims, seq_len=length) for length in (4096, 16384)]
    peaks = [trace(METHOD, sized, BigBirdParams(), "blocked", "train").peak_bytes for sized in lengths]
    assert peaks[1] < 4.1 * peaks[0]
