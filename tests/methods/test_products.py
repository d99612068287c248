"""Attention by plain products: the operator, the impls that stand on it, and where ``auto`` takes them."""

from __future__ import annotations

import math

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import fused, products, products_table
from ctxbench.implementations._shared.placed import Placed
from ctxbench.implementations._shared.products_forms import backward_scratch, product_pairs, scratch
from ctxbench.implementations.melodi import reference as melodi_reference
from ctxbench.implementations.melodi import slabs as melodi_slabs
from ctxbench.method import Dims
from ctxbench.registry import discover
from ctxbench.workload import as_output

METHODS = {method.name: method for method in discover()}
BY_SLABS = (
    "block_recurrent", "block_state", "compressive_memory", "melodi", "memory_bank", "rmt", "segment_recurrent",
)  # fmt: skip
SHAPES = {  # queries, keys, causal, strict, with a bias
    "whole": (330, 330, True, False, False),
    "a few left": (300, 300, True, False, False),
    "after a prefix": (330, 421, True, False, False),
    "first query blind": (330, 330, True, True, True),
    "own keys hidden": (330, 340, True, True, True),
    "all seen": (257, 60, False, False, False),
    "biased": (130, 130, False, False, True),
    "one query": (1, 5, True, False, True),
    "one blind query": (1, 1, True, True, True),
}


def operands(queries: int, keys: int) -> list[torch.Tensor]:
    """``q, k, v: [2, 3, t, 8]`` as projections leave them: heads inside."""
    generator = torch.Generator().manual_seed(queries + keys)
    lengths = (queries, keys, keys)
    drawn = (torch.randn(2, n, 3, 8, dtype=torch.float64, generator=generator) for n in lengths)
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def seen(queries, keys, causal, strict):
    everything = torch.ones(queries, keys, dtype=torch.bool)
    return everything.tril(keys - queries - strict) if causal else everything


def expected(q, k, v, causal, bias, scale, strict=False):
    visible = seen(q.shape[2], k.shape[2], causal, strict)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.masked_fill(~visible, 0)
    return (scores.masked_fill(~visible, -1e300).softmax(dim=3) * visible) @ v


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("budget", [1 << 21, 4 * 256 * 330, 7000], ids=["one part", "a row", "a head"])
def test_products_equal_the_whole_rectangle_with_all_gradients(shape, budget, monkeypatch):
    monkeypatch.setattr(products_table, "SCORES", budget)
    n, K, causal, strict, biased = shape
    inputs = operands(n, K)
    bias = None
    if biased:
        bias = torch.randn(3, n, K, dtype=torch.float64)
        bias = bias.masked_fill(~seen(n, K, causal, strict), -math.inf).requires_grad_()
    scale = 0.7 if biased else None
    mine, theirs = (f(*inputs, causal, bias, scale, strict) for f in (products.attend, expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    inputs += [bias] if biased else []
    grad = torch.randn_like(theirs)
    for ours, other in zip(
        torch.autograd.grad(mine, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


def test_every_query_has_a_key_and_only_a_bias_hides_it():
    with pytest.raises(ValueError, match="received 5 queries and 3 keys"):
        products.attend(*operands(5, 3))
    with pytest.raises(ValueError, match="give one, or strict=False"):
        products.attend(*operands(5, 5), strict=True)


def test_scores_of_the_first_keys_are_what_is_given_and_ask_for_no_gradient():
    q, k, v = operands(7, 9)
    first = torch.tensor([0.5, -1.0], dtype=torch.float64)
    plain = q @ k.transpose(2, 3) * 8**-0.5
    scores = torch.cat((first.expand(2, 3, 7, 2), plain[..., 2:]), dim=3)
    mine, theirs = products.attend(q, k, v, causal=False, first=first), scores.softmax(dim=3) @ v
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (mine, theirs)), strict=True)
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("budget", [1 << 21, 1000], ids=["one part", "a head"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "slopes"])
def test_first_keys_may_lie_elsewhere_in_every_row_of_the_batch(table, budget, monkeypatch):
    """Against the whole rectangle with each pair's number by a loop; all gradients, that of the table too."""
    monkeypatch.setattr(products_table, "SCORES", budget)
    n, K, P, first, farthest = 300, 312, 7, 5, 9
    inputs, places = operands(n, K), torch.randint(-400, 300, (2, P), dtype=torch.int32)
    behind = torch.randn(3, n, K - P, dtype=torch.float64)
    behind = behind.masked_fill(~seen(n, K - P, True, False), -math.inf).requires_grad_()
    compact = torch.randn((3, 2 * farthest + 1) if table else (3,), dtype=torch.float64).requires_grad_(table)
    away = torch.tensor([[[place - first - i for place in row] for i in range(n)] for row in places.tolist()])
    if table:
        front = torch.stack([compact[:, away[b].clamp(-farthest, farthest) + farthest] for b in range(2)])
    else:
        front = torch.stack([-compact[:, None, None] * away[b].abs() for b in range(2)])
    whole = torch.cat((front, behind.expand(2, -1, -1, -1)), dim=3)
    mine = products.attend(*inputs, bias=behind, placed=Placed(compact, places, first))
    theirs = expected(*inputs, True, whole, None)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    of, grad = [*inputs, behind, *[compact] * table], torch.randn_like(theirs)
    pairs = zip(*(torch.autograd.grad(y, of, grad) for y in (mine, theirs)), strict=True)
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="need a bias too"):
        products.attend(*inputs, placed=Placed(compact, places, first))


def test_calls_share_buffers_that_grow_and_none_where_gradients_are_asked_for():
    sizes = [(40, 40), (300, 350), (20, 70), (330, 330)]
    inputs = [[x.detach() for x in operands(*size)] for size in sizes]
    alone = [products.attend(*each) for each in inputs]
    with torch.no_grad(), products.buffers_kept():
        kept = [products.attend(*each) for each in inputs]
        low = products.attend(*(x.bfloat16() for x in inputs[1]))
        arena = products._KEPT.get().arena
        assert arena is not None
        products.attend(*(x.bfloat16() for x in inputs[0]))
        assert products._KEPT.get().arena is arena
    assert products._KEPT.get() is None
    for ours, other in zip(kept, alone, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0)
    torch.testing.assert_close(low.double(), alone[1], rtol=0, atol=0.05)
    with products.buffers_kept():
        own = [x.requires_grad_() for x in operands(300, 300)]
        first, second = products.attend(*own), products.attend(*own)
        assert products._KEPT.get() is None
    first.sum().backward()
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(1, 1, True), (200, 200, True), (200, 331, True), (9, 4, False)]
)
def test_fused_attention_is_causal_at_the_lower_right(queries, keys, causal):
    inputs = operands(queries, keys)
    torch.testing.assert_close(fused.attend(*inputs, causal), expected(*inputs, causal, None, None), rtol=0, atol=1e-12)


def test_rounding_is_that_of_bf16_scores():
    """Against exact scores, no worse than three times the fused kernel."""
    inputs = operands(300, 421)
    exact = expected(*inputs, True, None, None)
    low = [x.detach().bfloat16() for x in inputs]
    errors = [(f(*low, True).double() - exact).square().mean().sqrt() for f in (products.attend, fused.attend)]
    assert errors[0] < 3 * errors[1]


@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize(("queries", "keys", "heads"), [(512, 512, 4), (300, 832, 8), (2049, 2049, 8)])
def test_work_and_buffers_are_those_of_the_formulas(queries, keys, heads, train):
    from ctxbench.cost.symbols import B, d, e, h
    from ctxbench.cost.trace import Meter

    q, k, v = (torch.randn(2, heads, t, 16).bfloat16().requires_grad_(train) for t in (queries, keys, keys))
    with Meter() as forward:
        out = products.attend(q, k, v)
    sizes = {B: 2, d: heads * 16, h: heads, e: 2}
    pairs = product_pairs(queries, keys)
    assert forward.result().flops == 4 * 2 * heads * 16 * pairs
    buffers = int(scratch(queries, keys).subs(sizes))
    assert forward.result().peak_bytes == pytest.approx(buffers + out.nbytes, rel=0.01)
    if train:
        with Meter() as backward:
            out.backward(out.detach())
        assert backward.result().flops == 10 * 2 * heads * 16 * pairs
        gradients = q.nbytes + k.nbytes + v.nbytes
        buffers = int(backward_scratch(queries, keys).subs(sizes))
        assert backward.result().peak_bytes == pytest.approx(buffers + gradients, rel=0.02)


@pytest.mark.parametrize("empty", [1, 2, 3, 100, 4095, 4096, 10**6])
def test_null_scores_add_up_in_bf16(empty):
    scores = torch.tensor(melodi_slabs.null_scores(empty), dtype=torch.bfloat16).double()
    assert float(scores.exp().sum()) == pytest.approx(empty, rel=2e-3)


@pytest.mark.parametrize("empty", [0, 1, 37])
def test_null_slots_stand_for_all_empty_ones(empty):
    q, k, v = operands(5, 9)
    found, wanted = (each.recall(q, k, v, empty) for each in (melodi_slabs, melodi_reference))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BY_SLABS)
def test_slabs_equal_the_reference_over_segments_of_several_slabs(name):
    method = METHODS[name]
    segment = {method.segment: 256}
    params = method.params().replace(**segment)
    dims = Dims(seq_len=800, d_model=16, num_heads=2, d_ff=0, num_layers=1, position=method.positions[0])
    x, found = torch.randn(1, 800, 16, dtype=torch.float64), []
    for impl in ("reference", "slabs"):
        torch.manual_seed(0)
        module, own = method.make(dims, params, impl, "cpu", torch.float64), x.clone().requires_grad_()
        y = as_output(module(own)).y
        y.backward(x.flip(1))
        found.append([y.detach(), own.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-9 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("name", BY_SLABS)
@pytest.mark.parametrize("mode", ["forward", "train", "stream"])
def test_formulas_of_slabs_hold_in_bf16_with_several_layers_and_an_unfinished_segment(name, mode):
    method = METHODS[name]
    params, position = method.params(), method.positions[0]
    dims = Dims(seq_len=4200, batch_size=1, d_model=64, num_heads=4, num_layers=2, d_ff=256, position=position)
    cost, seen = method.cost_of("slabs", mode, True, position, params), trace(
        method, dims, params, "slabs", mode, "bf16")  # fmt: skip
    values = bindings(dims, params, 2, method.segment_len(params))
    assert evaluate(total(cost.flops), values) == seen.flops
    if cost.peak_bytes is not None:
        assert seen.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)


@pytest.mark.parametrize("name", [*BY_SLABS, "dense"])
def test_auto_takes_slabs_in_bf16_on_cpu_alone_and_where_native_does_not_train(name):
    method = METHODS[name]
    dims = Dims(seq_len=1024, position=method.positions[0])

    def picked(device: str, dtype: str, mode: str = "forward", without: tuple[str, ...] = ()) -> str:
        return method.pick(mode, dims, method.params(), device, dtype, without=without).impl

    assert picked("cpu", "bf16") == picked("cpu", "fp32") == "native"
    assert picked("cpu", "bf16", "train") == "slabs"
    assert picked("cpu", "fp64") == "blocked"
    assert picked("cpu", "fp32", "train") == "blocked"
    dims = dims.replace(seq_len=4096)
    assert picked("cpu", "fp32", "train") == ("native" if "train" in method.impl("native").modes else "blocked")
    assert picked("cpu", "fp32", without=("native",)) == "blocked"
    assert picked("cuda", "bf16") != "slabs"
    if name != "dense":
        assert picked("cpu", "bf16", "decode") == "blocked"
