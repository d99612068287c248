"""Biases by distance to retrieved items: long segments, places by hand, what they cost, and who does not take them.

The loop over single pairs, streams and states with biases are in ``test_compressive_memory``.
"""

from __future__ import annotations

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.compressive_memory import METHOD
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams as Parameters
from ctxbench.method import Dims

POSITION = pytest.mark.parametrize("position", ["t5", "alibi"])
FAST = ["blocked", "slabs"]  # in fp64 here
SMALL = Parameters(segment_len=8, recent_len=8, compressed_len=6, item_len=2, rate=2, top_k=5)
# Several slabs of queries, the last of them short, and distances on both sides of T5's farthest.
LONG = Parameters(segment_len=320, recent_len=32, compressed_len=32, item_len=8, rate=4, top_k=6)


def build(impl: str, params: Parameters, position: str, length: int) -> torch.nn.Module:
    torch.manual_seed(0)
    dims = Dims(length, d_model=12, num_heads=2, d_ff=16, num_layers=2, position=position)
    module = METHOD.make(dims, params, impl, "cpu", torch.float64)
    if position == "t5":
        torch.nn.init.normal_(module.layers[0].mixer.position.table.weight)
    return module


def tokens(length: int) -> torch.Tensor:
    return torch.randn(2, length, 12, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


@POSITION
@pytest.mark.parametrize(("params", "length"), [(SMALL, 43), (LONG, 700)], ids=["small", "long"])
def test_impls_equal_the_reference_with_all_gradients_and_in_streams(params, length, position):
    x, results = tokens(length), []
    for impl in ("reference", *FAST, "native"):  # whose operator has gradients, if no pass that auto would take
        module, own = build(impl, params, position, length), x.clone().requires_grad_()
        y = module(own).y
        y.backward(torch.ones_like(y) + x)
        results.append([y, own.grad, *(parameter.grad for parameter in module.parameters())])
        with torch.no_grad():
            state, outputs = module.init_state(2), []
            for chunk in x.split(
                [1, params.segment_len - 2, 3, params.segment_len, length - 2 - 2 * params.segment_len], 1
            ):
                out, state = module(chunk, state)
                outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, dim=1), y, rtol=0, atol=1e-12)
    assert len(results[0]) == 2 + 2 * (4 + 1 + 1 + 8 + 4) + (position == "t5")
    for reference, *others in zip(*results, strict=True):
        for found in others:
            torch.testing.assert_close(found, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_retrieved_rows_stand_where_their_tokens_did(impl):
    """Three segments of 8 in items of 2: tokens 16 to 23 are recent, three compressed items are left."""
    module = build(impl, SMALL.replace(top_k=7), "alibi", 24)
    with torch.no_grad():
        state = module(tokens(24), module.init_state(2)).state[0]
    # Entries 2 to 7, of tokens 4 to 15, stand at the later token of each two.
    entries, recent = [5, 7, 9, 11, 13, 15], list(range(16, 24))
    assert state.places.tolist() == [[place - 24 for place in entries + recent]] * 2
    assert state.places.dtype == torch.int32
    assert torch.equal(module.state_at(2, 24)[0].places, state.places)


@POSITION
@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("params", [SMALL, LONG], ids=["small", "long"])
def test_biases_cost_no_products_but_one_table_and_places(params, mode, position):
    trained = [impl for impl in ("reference", "blocked", "slabs") if impl != "slabs" or mode != "decode"]
    for impl in (*trained, *["native"] * (mode in ("forward", "stream"))):
        for length in (43, 1301) if params is LONG else (24, 43):
            dims = Dims(length, 2, 16, 4, 2, 24, position=position)
            cost = METHOD.cost_of(impl, mode, True, position, params)
            values = bindings(dims, params, 8, params.segment_len)
            seen = trace(METHOD, dims, params, impl, mode, "fp64")
            assert evaluate(total(cost.flops), values) == seen.flops, impl
            assert evaluate(cost.num_parameters, values) == seen.num_parameters
            assert seen.state_bytes == (evaluate(cost.state_bytes, values) if mode in ("stream", "decode") else None)
            assert not seen.uncounted
            assert cost.peak_bytes is None


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_peaks_grow_by_no_more_a_token_with_a_bias_than_without(mode):
    """The first segments retrieve less, so that growth is compared, from 8k tokens on."""

    def growth(impl: str, position: str) -> float:
        peaks = []
        for length in (8192, 16384, 24576):
            dims = Dims(length, d_model=128, num_heads=4, d_ff=0, position=position)
            peaks.append(trace(METHOD, dims, Parameters(), impl, mode, "fp64").peak_bytes)
        assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.01)
        return (peaks[1] - peaks[0]) / 8192

    for impl in (*FAST, *["native"] * (mode == "forward")):
        assert growth(impl, "t5") < 1.01 * growth(impl, "none")


@POSITION
def test_kernels_that_know_consecutive_keys_alone_say_so(monkeypatch, position):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as where triton is installed
    dims = Dims(64, d_model=64, num_heads=2, position=position)
    answer = METHOD.impl_support(METHOD.impl("triton"), "forward", dims, METHOD.params(), "cuda", "bf16")
    assert not answer
    assert "every row of the batch retrieves elsewhere" in answer.reason


def test_a_term_of_products_is_refused_for_its_reason():
    dims = Dims(64, d_model=64, num_heads=2, position="transformer_xl")
    answer = METHOD.mode_support("forward", dims, METHOD.params())
    assert not answer
    assert "product of every query with a projected row for each distance" in answer.reason
