"""Biases by distance in both looks of the segment-recurrent transformer: far ones, long segments, and what they cost.

``test_segment_recurrent`` has the loop over tokens, heads and keys, with short ones.
"""

from __future__ import annotations

import math

import pytest
import torch

from ctxbench.cell import Cell
from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, trace
from ctxbench.implementations._shared.positions import positions_for
from ctxbench.implementations.segment_recurrent import METHOD, blocked, reference, slabs, triton
from ctxbench.implementations.segment_recurrent.layer import Look
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.measure.gate import run_gate
from ctxbench.method import Dims
from ctxbench.testing import streamed
from ctxbench.workload import prepare

OPERATORS = {"reference": reference, "blocked": blocked, "slabs": slabs, "native": triton}
IMPLS = ("blocked", "diagonal", "slabs", "native")
LONG = {  # several slabs of queries, and distances beyond the last of T5's buckets
    "short memory": SegmentRecurrentParams(memory_len=70, segment_len=150),
    "long memory": SegmentRecurrentParams(memory_len=190, segment_len=140),
    "cut": SegmentRecurrentParams(memory_len=40, segment_len=130, bptt_depth=0),
}
biases = pytest.mark.parametrize("position", ["t5", "alibi"])
forms = pytest.mark.parametrize("params", LONG.values(), ids=LONG)


def make(impl, params, position, tokens):
    torch.manual_seed(0)
    dims = Dims(tokens, batch_size=2, d_model=8, num_heads=2, d_ff=12, num_layers=2, position=position)
    module = METHOD.make(dims, params, impl, "cpu", torch.float64)
    if position == "t5":  # of equal weights in every impl, but larger
        torch.nn.init.normal_(module.layers[0].position.table.weight, generator=torch.Generator().manual_seed(3))
    return module


def tokens_of(length):
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


SLOPES = (2**-4, 2**-8)
BUCKETS = {0: 0, 1: 1, 15: 15, 16: 16, 66: 26, 67: 27, 127: 31, 128: 31}  # of T5: 16 + floor(16 log_8 (i / 16))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@biases
@pytest.mark.parametrize("first", [1, 16, 67, 128])
def test_a_look_at_the_memory_alone_sees_items_where_they_lie(first, position, operator):
    """Queries of zeros weigh their keys by the bias alone, and values of ones and zeros show the weights."""
    (encoded,) = positions_for(Dims(64, d_model=4, num_heads=2, position=position))
    encoded = encoded.double()
    if position == "t5":
        encoded.table.weight = torch.nn.Parameter(torch.arange(64.0, dtype=torch.float64).view(32, 2) / 7)
    q, k = torch.zeros(1, 2, 1, 2, dtype=torch.float64), torch.randn(1, 2, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        found = operator.attend(q, k, torch.eye(2).double().expand(1, 2, 2, 2), Look(encoded, first, False, False))
    for head in range(2):
        logits = [
            (2 * BUCKETS[away] + head) / 7 if position == "t5" else -SLOPES[head] * away for away in (first, first - 1)
        ]
        weights = [math.exp(one) / sum(map(math.exp, logits)) for one in logits]
        torch.testing.assert_close(found[0, head, 0].tolist(), weights, rtol=0, atol=1e-12)


@forms
@biases
def test_long_segments_equal_reference_with_all_gradients(position, params):
    x, found = tokens_of(430), {}
    for impl in ("reference", *IMPLS[:3]):
        module, own = make(impl, params, position, 430), x.clone().requires_grad_()
        y = module(own).y
        (y * x.cos()).sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        found[impl] = [y.detach(), own.grad, *gradients]
    assert len(found["reference"]) == 2 + 2 * 28 + (position == "t5")
    for impl in IMPLS[:3]:
        for mine, expected in zip(found[impl], found["reference"], strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@biases
def test_calls_that_end_anywhere_in_a_long_segment(position, impl):
    params, x = LONG["long memory"], tokens_of(430)
    with torch.no_grad():
        expected = make("reference", params, position, 430)(x).y
        module = make(impl, params, position, 430)
        for sizes in ([140, 140, 140, 10], [1, 137, 3, 200, 1, 88]):
            torch.testing.assert_close(streamed(module, x, sizes).y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "position"), [*((name, "t5") for name in LONG), ("long memory", "alibi")])
def test_biases_cost_no_products_and_one_table(name, position):
    params = LONG[name]
    for mode in METHOD.modes:
        for length in (params.segment_len - 1, params.segment_len, 503) if mode == "decode" else (503,):
            dims = Dims(length, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=24, position=position)
            for impl in ("reference", *IMPLS):
                if not METHOD.impl_support(METHOD.impl(impl), mode, dims, params, "cpu", "fp64"):
                    continue
                cost, work = (
                    METHOD.cost_of(impl, mode, True, position, params),
                    prepare(METHOD, dims, params, impl, mode, "fp64"),
                )
                with Meter() as meter:
                    work.call()
                values, seen = bindings(dims, params, 8, params.segment_len), meter.result()
                assert evaluate(total(cost.flops), values) == seen.flops, (impl, mode)
                assert evaluate(cost.num_parameters, values) == sum(p.numel() for p in work.module.parameters())
                assert not seen.uncounted
                assert cost.peak_bytes is None


def test_no_bias_is_longer_than_a_segment_and_its_memory():
    """A stream's peak is that of one segment, and blocked keeps none of the scores that the reference trains with."""
    params = SegmentRecurrentParams(memory_len=128, segment_len=256)

    def peak(impl, mode, tokens):
        dims = Dims(tokens, d_model=32, num_heads=8, d_ff=0, position="t5")
        return trace(METHOD, dims, params, impl, mode, "fp64" if impl == "slabs" else "fp32").peak_bytes

    for impl in ("blocked", "slabs", "native"):
        assert peak(impl, "stream", 1280) == peak(impl, "stream", 1536)
    for impl in IMPLS[:2]:
        assert 2 * peak(impl, "train", 1024) < peak("reference", "train", 1024)


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_the_gate_lets_biases_pass(impl, mode):
    for position, dtype in (("t5", "bf16"), ("alibi", "fp32")):
        cell = Cell(
            method=METHOD.name, impl=impl, mode=mode, seq_len=101, d_model=16, num_heads=2, d_ff=16, num_layers=2,
            position=position, dtype=dtype, params={"segment_len": 16, "memory_len": 8},
        )  # fmt: skip
        dims, params = cell.dims, METHOD.params().replace(**cell.params)
        if METHOD.impl_support(METHOD.impl(impl), mode, dims, params, "cpu", dtype):
            gate = run_gate(METHOD, cell)
            assert gate.ok, gate.message


def test_transformer_xl_is_refused_with_the_reason():
    answer = METHOD.mode_support("forward", Dims(64, position="transformer_xl"), METHOD.params())
    assert not answer
    assert "each look would need projections" in answer.reason
