"""BigBird's external construction, and the random blocks of the published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.bigbird import METHOD
from ctxbench.implementations.bigbird.cost import visible_pairs
from ctxbench.implementations.bigbird.etc_cost import etc_visible_pairs
from ctxbench.implementations.bigbird.official import drawn
from ctxbench.implementations.bigbird.params import BigBirdParams, reach
from ctxbench.method import Dims
from ctxbench.testing import Case
from ctxbench.testing.agreement import agreement
from ctxbench.testing.behaviour import any_length, batch_independence, determinism, receptive_field, shape_and_dtype
from ctxbench.testing.costs import flops_equal_formula, parameters_equal_formula
from ctxbench.testing.gradients import gradcheck

GOLDEN = Path(__file__).parents[1] / "golden" / "bigbird.npz"
PLANS = ("first_stretch", "two_stretches", "one_stretch", "old_3072", "old_4096")
ATTENTION = ("most_blocks_unseen", "one_random", "blocks_of_one")
VARIANTS = {
    "etc": BigBirdParams(form="etc", num_global=3, local_radius=4),
    "etc_without_neighbours": BigBirdParams(form="etc", num_global=1, local_radius=0),
    "official": BigBirdParams(block_size=2, num_random=2, plan="official"),
}
LAWS = [
    agreement, batch_independence, determinism, shape_and_dtype, receptive_field, flops_equal_formula,
    parameters_equal_formula, gradcheck,
]  # fmt: skip
impls = pytest.mark.parametrize("impl", ["reference", "blocked"])


def golden(case: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {key.split("/")[1]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{case}/")}


@impls
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_laws_hold_for_the_variant(law, variant: str, impl: str) -> None:
    dims = Dims(seq_len=30, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=32, causal=False)
    law(Case(METHOD, impl, VARIANTS[variant], dims, METHOD.modes, label=variant))


@impls
def test_the_external_construction_takes_any_length(impl: str) -> None:
    dims = Dims(seq_len=30, batch_size=2, d_model=16, num_heads=2, d_ff=32, causal=False)
    any_length(Case(METHOD, impl, VARIANTS["etc"], dims, METHOD.modes))


@impls
def test_the_external_construction_equals_longformer_with_tied_projections(impl: str) -> None:
    """Of the package transformers; its softmax is float32, and its output projections are elsewhere."""
    arrays = golden("etc")
    length, num_global, radius = arrays["sizes"].tolist()
    dims = Dims(seq_len=length - num_global, d_model=8, num_heads=2, d_ff=0, causal=False)
    params = BigBirdParams(form="etc", num_global=num_global, local_radius=radius)
    mixer = METHOD.make(dims, params, impl, "cpu", torch.float64).layers[0].mixer
    mixer.o = mixer.o_global = torch.nn.Identity()
    mixer.load_state_dict({key: arrays[key] for key in mixer.state_dict()})
    x = arrays["x"].requires_grad_()
    y = mixer(x).y
    y.backward(arrays["grad"])
    torch.testing.assert_close(y, arrays["y"], rtol=0, atol=2e-6)
    torch.testing.assert_close(x.grad, arrays["grad.x"], rtol=0, atol=5e-6)
    for key, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, arrays[f"grad.{key}"], rtol=0, atol=2e-5)


def test_global_tokens_have_an_output_projection_of_their_own() -> None:
    dims = Dims(seq_len=7, d_model=8, num_heads=2, d_ff=0, causal=False)
    mixer = METHOD.make(dims, VARIANTS["etc"], "reference", "cpu", torch.float64).layers[0].mixer
    with torch.no_grad():
        x = torch.randn(1, 10, 8, dtype=torch.float64)
        before = mixer(x).y
        mixer.o_global.weight.zero_()
        after = mixer(x).y
    assert torch.equal(before[:, 3:], after[:, 3:])
    assert (before[:, :3] != after[:, :3]).all()


@pytest.mark.parametrize(("length", "num_global", "radius"), [(1, 1, 0), (5, 3, 9), (30, 2, 4), (200, 7, 66)])
def test_pairs_of_the_external_construction_equal_a_count_one_by_one(length: int, num_global: int, radius: int) -> None:
    params = BigBirdParams(form="etc", num_global=num_global, local_radius=radius)
    window, tokens = params.window(), num_global + length
    values = bindings(Dims(seq_len=length, causal=False), params, 4, 512)
    assert evaluate(etc_visible_pairs(), values) == sum(len(window.sees(i, tokens)) for i in range(tokens))


def test_costs_of_the_external_construction_at_published_sizes() -> None:
    values = bindings(Dims(seq_len=4096, d_model=768, num_heads=12, causal=False), BigBirdParams(), 4, 512)
    assert evaluate(etc_visible_pairs(), values) == 2_847_772
    cost = METHOD.cost_of("blocked", "forward", False, "none", BigBirdParams(form="etc"))
    assert big_o(total(cost.flops)) == "O(T)"
    layer = 5 * (768**2 + 768) + 4 * 768 + 2 * 768 * 1024 + 1024 + 768
    assert evaluate(cost.num_parameters, values) == layer + 256 * 768


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_memory_of_the_external_construction_is_linear(mode: str) -> None:
    dims, params = Dims(seq_len=2048, d_model=64, d_ff=0, causal=False), BigBirdParams(form="etc")
    peaks = [trace(METHOD, dims.replace(seq_len=n), params, "blocked", mode).peak_bytes for n in (2048, 8192)]
    assert peaks[1] < 4.1 * peaks[0]


@pytest.mark.parametrize("blocks_and_runs", [1, 63, 64, 65, 300])
def test_formulas_count_what_runs_where_blocks_are_ragged(blocks_and_runs: int) -> None:
    params = BigBirdParams(form="etc", num_global=5, local_radius=70)
    dims = Dims(seq_len=blocks_and_runs, d_model=16, num_heads=2, d_ff=24, causal=False)
    cost, counted = METHOD.cost_of("blocked", "forward", False, "none", params), trace(METHOD, dims, params, "blocked")
    assert evaluate(total(cost.flops), bindings(dims, params, 4, 512)) == counted.flops


def test_one_layer_reaches_its_neighbours_and_two_reach_everything() -> None:
    dims, params = Dims(seq_len=30, causal=False), VARIANTS["etc"]
    assert reach(dims, params, 10) == set(range(6, 15))
    assert reach(dims.replace(num_layers=2), params, 10) == set(range(30))


@pytest.mark.parametrize("case", PLANS)
def test_official_blocks_are_those_of_the_published_code(case: str) -> None:
    arrays = golden(f"plan_{case}")
    size, blocks, num_random, heads = arrays["sizes"].tolist()
    seed = PLANS.index(case) + 5
    assert torch.tensor(drawn(size * blocks, size, num_random, heads, seed)).equal(arrays["random"].long())


@impls
@pytest.mark.parametrize("case", ATTENTION)
def test_official_plan_gives_the_published_outputs(case: str, impl: str) -> None:
    """Without the lists of the golden file: they are drawn again."""
    arrays = golden(case)
    size, blocks, num_random = arrays["sizes"].tolist()
    params = BigBirdParams(block_size=size, num_random=num_random, plan="official", seed=ATTENTION.index(case) + 1)
    dims = Dims(seq_len=size * blocks, d_model=8, num_heads=2, d_ff=0, causal=False)
    assert METHOD.mode_support("forward", dims, params)
    mixer = METHOD.make(dims, params, impl, "cpu", torch.float64).layers[0].mixer
    mixer.o = torch.nn.Identity()
    mixer.load_state_dict({key: arrays[key] for key in mixer.state_dict()})
    torch.testing.assert_close(mixer(arrays["x"]).y, arrays["y"], rtol=0, atol=1e-14)


def test_every_layer_of_the_official_plan_has_the_seed_of_its_number() -> None:
    params, dims = VARIANTS["official"], Dims(seq_len=30, num_heads=2, num_layers=3, causal=False)
    module = METHOD.make(dims, params, "blocked", "cpu", torch.float32)
    for layer in range(3):
        rows = drawn(30, 2, 2, 2, layer)[1][1:-1]
        expected = [sorted({0, row - 1, row, row + 1, 14, *more}) for row, more in enumerate(rows, start=2)]
        assert module.layers[layer].mixer.inner[1].tolist() == expected


@pytest.mark.parametrize(
    ("length", "changes", "reason"),
    [
        (1000, {}, "needs a multiple of block_size = 64 tokens, received 1000"),
        (1024, {}, "lets a row see a block twice at 1024 tokens"),
        (640, {"num_random": 4}, "finds fewer than 4 blocks for some of its 10 rows"),
        (4096, {"random_within": 20}, "random_within must be 0 with plan=official"),
        (4096, {"form": "etc"}, ""),
        (2048, {}, ""),
        (3072, {}, ""),
        (4096, {}, ""),
    ],
)
def test_the_official_plan_says_where_it_cannot_be_had(length: int, changes: dict, reason: str) -> None:
    params = BigBirdParams(plan="official").replace(**changes)
    answer = METHOD.mode_support("forward", Dims(seq_len=length, causal=False), params)
    assert bool(answer) == (not reason)
    assert reason in answer.reason


def test_official_and_uniform_plans_have_equally_many_pairs() -> None:
    params, length = BigBirdParams(plan="official"), 4096
    values = bindings(Dims(seq_len=length, causal=False), params, 4, 512)
    plan = params.pattern(length, 4).sees(0, 3)
    assert evaluate(visible_pairs(), values) == 64**2 * sum(map(len, plan))
