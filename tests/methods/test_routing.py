"""Routing Transformer against two public packages, loops written from the equations, and counts one by one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from ctxbench.cost import big_o, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.routing import METHOD, blocked, reference
from ctxbench.implementations.routing.cost import Form
from ctxbench.implementations.routing.layer import Rules, routed_vectors
from ctxbench.implementations.routing.params import RoutingParams
from ctxbench.implementations.routing.routing import (
    Centroids,
    assigned,
    balanced_pairs,
    cluster_sizes,
    commitment_loss,
    taken,
    taken_in_rounds,
    updated,
    visited_pairs,
)
from ctxbench.method import Dims
from ctxbench.testing import Case
from ctxbench.testing.agreement import agreement
from ctxbench.testing.behaviour import (
    any_length,
    batch_independence,
    causality,
    decode_continues,
    influence,
    receptive_field,
    streaming_equals_whole,
)
from ctxbench.testing.costs import flops_equal_formula, parameters_equal_formula, state_bytes_equal_formula
from ctxbench.testing.gradients import gradcheck

PLAIN = Position()
GOLDEN = Path(__file__).parents[1] / "golden" / "routing.npz"
OPERATORS = {"reference": reference.OPERATORS, "blocked": blocked.OPERATORS}
FORMS = {  # the kit's own cases are strict, with a local and a routed head
    "routed heads alone": (RoutingParams(num_clusters=4, local_share=0.0), True),
    "without itself": (RoutingParams(num_clusters=3, local_block=5, exclude_self=True), True),
    "more clusters than tokens": (RoutingParams(num_clusters=40, local_block=4, local_share=0.25), True),
    "local heads alone": (RoutingParams(local_block=4, local_share=1.0), True),
    "strict, bidirectional": (RoutingParams(num_clusters=3, local_share=0.0), False),
    "topw": (RoutingParams(selection="topw", num_clusters=4, local_block=6), False),
    "topw, few taken": (RoutingParams(selection="topw", num_clusters=3, cluster_size=4, local_share=0.0), False),
    "topw, masked": (RoutingParams(selection="topw", num_clusters=4, masked=True, local_share=0.0), False),
    "topw, published": (RoutingParams(selection="topw", num_clusters=5, masked=True, exclude_self=True), False),
}
LAWS = [agreement, any_length, batch_independence, causality, decode_continues, flops_equal_formula, gradcheck]
LAWS += [parameters_equal_formula, receptive_field, state_bytes_equal_formula, streaming_equals_whole]


def form_case(name: str, impl: str, layers: int = 2) -> Case:
    params, causal = FORMS[name]
    dims = Dims(seq_len=23, batch_size=2, d_model=16, num_heads=4, num_layers=layers, d_ff=16, causal=causal)
    return Case(METHOD, impl, params, dims, METHOD.modes, label=name)


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as arrays:
        return {
            key.removeprefix(f"{name}/"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{name}/")
        }


def compare(y: torch.Tensor, expected: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]) -> None:
    y.backward(expected["grad"])
    torch.testing.assert_close(y, expected["y"], rtol=0, atol=1e-13)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"grad.{name}"], rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("name", ["shared", "shared_uncovered", "separate", "balanced"])
def test_topw_equals_the_package(name: str, impl: str) -> None:
    """Outputs and gradients of KmeansAttention of the package routing-transformer."""
    tensors = golden(name)
    length, clusters, window, shared = map(int, tensors["sizes"])
    leaves = {key: tensors[key].requires_grad_() for key in ("q", "k", "v") if key in tensors}
    q, v = leaves["q"], leaves["v"]
    k = normalize(q, dim=-1) if shared else leaves["k"]
    ids = [taken(normalize(x, dim=-1), tensors["means"], window) for x in (q, k)]
    y = OPERATORS[impl].topw(q, k, v, *ids, Rules(clusters, bool(shared), bool(shared)), PLAIN)
    times = cluster_sizes(ids[0].flatten(2).int(), length).double()  # by token: clusters that took it
    assert bool((times == 0).any()) == (name != "balanced")
    compare(y * (times / (times + 1e-5))[..., None], tensors, leaves)


@pytest.mark.parametrize("impl", OPERATORS)
def test_strict_equals_the_package_where_clusters_are_balanced(impl: str) -> None:
    tensors = golden("balanced")
    leaves = {key: tensors[key].requires_grad_() for key in ("q", "v")}
    k = normalize(leaves["q"], dim=-1)
    ids = assigned(k, tensors["means"])
    assert cluster_sizes(ids, 4).eq(4).all()
    y = OPERATORS[impl].strict(leaves["q"], k, leaves["v"], ids, ids, Rules(4, True, True), PLAIN)
    compare(y / (1 + 1e-5), tensors, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "w"), [(5, 5), (40, 9), (301, 7), (70_000, 50)], ids=str)
def test_rounds_take_the_first_of_equally_near_tokens_in_16_bits(length: int, w: int, dtype: torch.dtype) -> None:
    vectors = torch.randint(-2, 3, (2, 1, length, 2)).to(dtype)
    means = torch.tensor([[[1.0, 2.0], [-1.0, 0.5], [0.0, -0.0], [-3.0, -1.0]]], dtype=dtype)
    similarity = means @ vectors.transpose(2, 3)
    assert similarity.unique().numel() < similarity[..., 0].numel() * length, "many are equally near"
    torch.testing.assert_close(taken_in_rounds(vectors, means, w), taken(vectors, means, w), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_commitment_loss_equals_the_package(name: str) -> None:
    tensors = golden(name)
    vectors = torch.cat([tensors[key] for key in ("q", "k") if key in tensors], dim=2)
    loss = commitment_loss(normalize(vectors, dim=-1), tensors["means"])
    torch.testing.assert_close(loss, tensors["loss"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("name", ["local_causal", "local_causal_ragged", "local_bidirectional"])
def test_local_heads_equal_the_package(name: str, impl: str) -> None:
    """Outputs and gradients of LocalAttention of the package local-attention."""
    tensors = golden(name)
    leaves = {key: tensors[key].requires_grad_() for key in ("q", "k", "v")}
    _, block, causal = map(int, tensors["sizes"])
    compare(OPERATORS[impl].local(*leaves.values(), block, bool(causal), PLAIN), tensors, leaves)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize(
    ("causal", "exclude", "position"),
    [(True, False, "none"), (True, True, "none"), (False, False, "none"), (True, False, "rope")],
)
def test_mixer_equals_a_loop_over_tokens(impl: str, causal: bool, exclude: bool, position: str) -> None:
    """Half of four heads local, half strict: written from the equations, one query at a time."""
    params = RoutingParams(num_clusters=3, local_block=4, exclude_self=exclude)
    dims = Dims(seq_len=19, d_model=24, num_heads=4, causal=causal, position=position)
    torch.manual_seed(1)
    mixer = METHOD.make(dims, params, impl, "cpu", torch.float64).layers[0].mixer
    x = torch.randn(1, 19, 24, dtype=torch.float64)
    q, v = mixer.q(x)[0].view(19, 4, 6), mixer.v(x)[0].view(19, 4, 6)
    k, out = mixer.k(x)[0].view(19, 2, 6), torch.zeros(19, 4, 6, dtype=torch.float64)
    for head, i in itertools.product(range(4), range(19)):
        if head < 2:
            seen = [j for j in range(19) if abs(i // 4 - j // 4) <= 1]
            queries, keys = q[:, head], k[:, head]
        else:
            queries = keys = layer_norm(q[:, head], (6,))
            cluster = (keys @ mixer.means[head - 2].T).argmax(dim=1)
            seen = [j for j in range(19) if cluster[j] == cluster[i]]
        query, keys = mixer.position.rotate(queries, 0)[i], mixer.position.rotate(keys, 0)
        if causal:
            seen = [j for j in seen if j <= i]
        if exclude and head >= 2:
            seen = [j for j in seen if j != i] or [i]
        weights = torch.stack([query @ keys[j] / 6**0.5 for j in seen]).softmax(dim=0)
        out[i, head] = sum(weight * v[j, head] for weight, j in zip(weights, seen, strict=True))
    torch.testing.assert_close(mixer(x).y[0], mixer.o(out.flatten(1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_laws_hold_for_every_form(law, name: str, impl: str) -> None:
    if law is receptive_field and FORMS[name][0].masked:
        pytest.skip("a later token seldom takes an earlier one's place: a few draws do not show every pair")
    # Rounding in one layer may move a token to another cluster in the next; only the first layer's choice is shared.
    law(form_case(name, impl, layers=1 if law is agreement else 2))


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize(("exclude", "position"), [(False, "rope"), (True, "none")])
def test_streams_need_not_be_cut_at_blocks(impl: str, exclude: bool, position: str) -> None:
    """Nor is a gradient lost on the way through the state."""
    params = RoutingParams(num_clusters=3, local_block=5, exclude_self=exclude)
    dims = Dims(seq_len=31, d_model=16, num_layers=2, position=position)
    module = METHOD.make(dims, params, impl, "cpu", torch.float64)
    x = torch.randn(2, 31, 16, dtype=torch.float64, requires_grad=True)
    whole = module(x).y
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    for sizes in ([1] * 31, [7, 1, 12, 4, 7], [3, 28]):
        pieces, state = [], module.init_state(2)
        for chunk in x.split(sizes, dim=1):
            y, state = module(chunk, state)
            pieces.append(y)
        y = torch.cat(pieces, dim=1)
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-13)
        (seen,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-11)
    assert state[0].local_k.shape[2] == 6  # 31 tokens: block 5 and the one token of block 6


def test_topw_leaks_and_is_refused_as_causal() -> None:
    """Its masks hide later keys; that a later token takes an earlier one's place in a cluster they cannot hide."""
    case = form_case("topw, masked", "reference")
    assert any(i < changed for changed, outputs in enumerate(influence(case)) for i in outputs)
    answer = METHOD.mode_support("forward", case.dims.replace(causal=True), case.params)
    assert not answer
    assert "push an earlier one out" in answer.reason


@pytest.mark.parametrize(
    "changes", [{"masked": True}, {"selection": "topw", "exclude_self": True}], ids=["strict", "separate"]
)
def test_params_without_meaning_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="topw"):
        RoutingParams(**changes)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("clusters", [1, 4, 7])
def test_pairs_equal_a_count_one_by_one(clusters: int, causal: bool) -> None:
    """Local pairs, and those of tokens dealt out to the clusters in turn."""
    params = RoutingParams(num_clusters=clusters, local_block=4)
    form = Form(params, causal)
    for length in range(1, 30):
        values = bindings(Dims(seq_len=length, causal=causal), params, 4, 4)
        pairs = [(i, j) for i in range(length) for j in range(length) if not causal or j <= i]
        assert evaluate(form.local_visible(), values) == sum(abs(i // 4 - j // 4) <= 1 for i, j in pairs)
        dealt = sum(i % clusters == j % clusters for i, j in pairs)
        assert evaluate(form.routed_visible(), values) == dealt == balanced_pairs(length, clusters, causal)
        sizes = cluster_sizes(torch.arange(length).view(1, 1, -1) % clusters, clusters)
        assert visited_pairs(sizes, causal).item() == dealt


def test_load_tells_what_the_nominal_count_does_not() -> None:
    """All tokens in one cluster: the result is that of dense attention, the work k times the balanced one."""
    q, v = torch.randn(2, 1, 2, 64, 8, dtype=torch.float64)
    one, even = torch.full((1, 2, 64), 2, dtype=torch.int32), torch.arange(64).expand(1, 2, 64) % 4
    y = blocked.OPERATORS.strict(q, q, v, one, one, Rules(4, True, False), PLAIN)
    dense = torch.nn.functional.scaled_dot_product_attention(q, q, v, is_causal=True)
    torch.testing.assert_close(y, dense, rtol=0, atol=1e-13)
    assert cluster_sizes(one, 4).tolist() == [[[0, 0, 64, 0]] * 2]
    assert visited_pairs(cluster_sizes(one, 4), causal=True).tolist() == [[64 * 65 // 2] * 2]
    assert visited_pairs(cluster_sizes(even, 4), causal=True).tolist() == [[balanced_pairs(64, 4, True)] * 2]


def test_cells_of_the_suite_are_nearly_balanced() -> None:
    torch.manual_seed(0)
    module = METHOD.make(Dims(seq_len=2048), RoutingParams(), "blocked", "cpu", torch.float32)
    (vectors,) = routed_vectors(module, torch.randn(1, 2048, 256))
    sizes = cluster_sizes(assigned(vectors, module.layers[0].mixer.means), 16)
    assert sizes.sum(dim=2).eq(2048).all()
    assert (visited_pairs(sizes, causal=True) / balanced_pairs(2048, 16, causal=True)).max() < 1.2


def test_moving_averages_equal_a_loop() -> None:
    torch.manual_seed(3)
    means, sums = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    counts = torch.rand(2, 3, dtype=torch.float64) + 1
    vectors = torch.randn(2, 2, 9, 4, dtype=torch.float64)
    new = updated(Centroids(means, sums, counts), vectors, decay=0.9, epsilon=1e-3)
    for head in range(2):
        n, s = 0.9 * counts[head], 0.9 * sums[head]
        for b, t in itertools.product(range(2), range(9)):
            x = vectors[b, head, t]
            nearest = max(range(3), key=lambda cluster: float(means[head, cluster] @ x))
            n[nearest] += 0.1
            s[nearest] += 0.1 * x
        smoothed = (n + 1e-3) / (n.sum() + 3e-3) * n.sum()
        torch.testing.assert_close(new.counts[head], n)
        torch.testing.assert_close(new.sums[head], s)
        torch.testing.assert_close(new.means[head], s / smoothed[:, None])


def test_centroids_are_learned_outside_the_forward_pass() -> None:
    params = RoutingParams(num_clusters=4, local_share=0.0)
    module = METHOD.make(Dims(seq_len=64, d_model=16, num_layers=2), params, "blocked", "cpu", torch.float64)
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    losses = []
    for _ in range(12):
        found = routed_vectors(module, x)
        mixers = [layer.mixer for layer in module.layers]
        losses.append(
            [commitment_loss(vectors, mixer.means).item() for vectors, mixer in zip(found, mixers, strict=True)]
        )
        for vectors, mixer in zip(found, mixers, strict=True):
            mixer.load_centroids(updated(mixer.centroids(), vectors, decay=0.5))
    assert all(last < 0.8 * first for first, last in zip(losses[0], losses[-1], strict=True))
    loss = commitment_loss(routed_vectors(module, x)[1], module.layers[1].mixer.means)
    loss.backward()
    assert module.layers[0].mixer.q.weight.grad.any()
    assert module.layers[1].mixer.k is None  # routed keys are the queries


@pytest.mark.parametrize("mode", METHOD.modes)
def test_long_cells_are_traced_without_values(mode: str) -> None:
    """On fake tensors the operator for clusters is charged for balanced ones, and its memory is linear."""
    dims, params = Dims(seq_len=4096, d_model=64, num_heads=4, d_ff=128), RoutingParams()
    cost = METHOD.cost_of("blocked", mode, True, "none", params)
    traced = trace(METHOD, dims, params, "blocked", mode)
    values = bindings(dims, params, 4, 256)
    assert not traced.untraceable
    assert traced.flops == evaluate(total(cost.flops), values)
    assert traced.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)
    assert big_o(cost.peak_bytes) == "O(T)"
    assert big_o(total(cost.flops)) == ("O(T)" if mode == "decode" else "O(T^2)")
