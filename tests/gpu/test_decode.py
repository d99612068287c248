"""Decoding kernels: against float64, and in dense, which decodes with them."""

from __future__ import annotations

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import decode_table
from ctxbench.implementations.dense import METHOD
from ctxbench.method import Dims


def test_decoding_agrees_with_float64_in_the_interpreter(program, wrong) -> None:
    rows = program("decode_parity.py", interpret=True)
    assert len(rows) == 18
    assert not wrong(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_decoding_agrees_with_float64_on_the_device(program, wrong) -> None:
    rows = program("decode_parity.py", interpret=False)
    assert {dtype for _case, dtype, _errors in rows} == {"bf16", "fp16", "fp32"}
    assert not wrong(rows)


@pytest.mark.parametrize("context", [1, 100, 8192])
def test_formulas_of_dense_are_what_the_tracer_counts(context: int) -> None:
    pytest.importorskip("triton")
    params, dims = METHOD.params(), Dims(seq_len=context, num_layers=2, batch_size=2)
    counted = trace(METHOD, dims, params, "triton", "decode", "fp32")
    cost = METHOD.cost_of("triton", "decode", True, "none", params)
    values = bindings(dims, params, 4, METHOD.segment_len(params))
    assert evaluate(total(cost.flops), values) == counted.flops
    assert evaluate(cost.peak_bytes, values) == counted.peak_bytes
    assert not counted.uncounted


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_visible_pairs_are_counted_one_by_one(queries: int, keys: int, causal: bool) -> None:
    pairs = [key <= position or not causal for position in range(keys - queries, keys) for key in range(keys)]
    assert decode_table.visible_pairs(queries, keys, causal) == sum(pairs)


def test_parts_fill_a_device_and_are_no_more_than_tiles() -> None:
    assert decode_table.splits(heads=1, tiles=2048) == decode_table.BLOCKS
    assert decode_table.splits(heads=32, tiles=2048) == 9
    assert decode_table.splits(heads=1, tiles=3) == 3
    assert decode_table.splits(heads=1000, tiles=3) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": 0}, "between 1 and the 8 rows"),
        ({"keys": 9}, "between 1 and the 8 rows"),
        ({"keys": 7, "start": 2}, "only a full ring"),
        ({"start": 6, "sinks": 2}, "must lie in a cache of 8 rows"),
        ({"heads": 3}, "a multiple of those"),
        ({"dtype": torch.float64}, "all fp32, fp16 or bf16"),
        ({"width": 264}, "at most 256 channels"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(changes: dict, message: str) -> None:
    pytest.importorskip("triton")
    from ctxbench.implementations._shared.decode import decode

    heads, width, dtype = changes.pop("heads", 2), changes.pop("width", 16), changes.pop("dtype", torch.float32)
    q, k = torch.zeros(1, heads, 1, width, dtype=dtype), torch.zeros(1, 2, 8, width, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        decode(q, k, k, **changes)


@pytest.mark.parametrize(
    ("width", "dtype", "reason"), [(512, "bf16", "at most 256"), (64, "fp64", "not in fp64"), (256, "fp16", "")]
)
def test_support_says_why_not(width: int, dtype: str, reason: str) -> None:
    answer = decode_table.support(width, heads=4, dtype=dtype)
    assert bool(answer) is not bool(reason)
    assert reason in answer.reason
