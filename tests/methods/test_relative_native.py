"""The C++ kernel of relative attention: the methods that have it, against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations._shared import relative, relative_native
from ctxbench.implementations.compressive_transformer import METHOD as COMPRESSIVE
from ctxbench.implementations.transformer_xl import METHOD as TRANSFORMER_XL
from ctxbench.method import Dims, Method

CASES: dict[str, tuple[Method, dict[str, Any], int, int]] = {  # parameters, length, batch
    "staircase": (TRANSFORMER_XL, {"segment_len": 5, "mem_len": 6}, 29, 2),
    "zeros": (TRANSFORMER_XL, {"segment_len": 5, "mem_len": 6, "start": "zeros"}, 29, 1),
    "clamped": (TRANSFORMER_XL, {"segment_len": 5, "mem_len": 9, "clamp_len": 4}, 29, 1),
    "band": (TRANSFORMER_XL, {"segment_len": 4, "mem_len": 6, "same_length": True}, 29, 2),
    "several tiles": (TRANSFORMER_XL, {"segment_len": 200, "mem_len": 150}, 701, 1),
    "several pieces in a band": (
        TRANSFORMER_XL, {"segment_len": 700, "mem_len": 90, "same_length": True}, 1501, 1,
    ),
    "entries": (COMPRESSIVE, {"segment_len": 6, "mem_len": 4, "compressed_len": 5}, 41, 2),
    "nothing compressed": (COMPRESSIVE, {"segment_len": 6, "mem_len": 4, "compressed_len": 0}, 41, 1),
    "entries in several tiles": (COMPRESSIVE, {"segment_len": 150, "mem_len": 150, "compressed_len": 70}, 900, 1),
    "entries in several pieces": (COMPRESSIVE, {"segment_len": 600, "mem_len": 64, "compressed_len": 100}, 1900, 1),
}  # fmt: skip
every_case = pytest.mark.parametrize(("method", "changes", "length", "batch"), CASES.values(), ids=CASES)


def build(method: Method, impl: str, params: Any, dims: Dims, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    module = method.make(dims, params, impl, "cpu", torch.float64)
    with torch.no_grad():
        for layer in module.layers:
            layer.mixer.content_bias.normal_()
            layer.mixer.position_bias.normal_()
    return module.to(dtype)


@every_case
def test_outputs_equal_the_reference_for_any_cut(method: Method, changes: dict, length: int, batch: int) -> None:
    params, dims = method.params(**changes), Dims(length, batch, 60, 3, 2, 0, position="transformer_xl")
    x = torch.randn(batch, length, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = build(method, "reference", params, dims, torch.float64)(x).y
        for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
            module = build(method, "native", params, dims, dtype)
            assert (module(x.to(dtype)).y - expected).abs().max() < limit
            cut, state, parts = length * 2 // 5, module.init_state(batch), []
            for piece in x.to(dtype).split((cut, 1, length - cut - 1), dim=1):
                y, state = module(piece, state)
                parts.append(y)
            assert (torch.cat(parts, dim=1) - expected).abs().max() < limit


@pytest.mark.parametrize("name", ["staircase", "band", "entries"])
def test_gradients_are_those_of_blocked(name: str) -> None:
    method, changes, length, batch = CASES[name]
    params, dims = method.params(**changes), Dims(length, batch, 12, 2, 2, 16, position="transformer_xl")
    found = []
    for impl in ("blocked", "native"):
        module = build(method, impl, params, dims, torch.float64).eval()
        x = torch.linspace(-1, 1, batch * length * 12, dtype=torch.float64).sin().view(batch, length, 12)
        x.requires_grad_()
        module(x).y.square().sum().backward()
        found.append([x.grad, *(weight.grad for weight in module.parameters() if weight.grad is not None)])
    assert len(found[0]) == len(found[1]) > 8
    for expected, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-11, atol=1e-11)


@every_case
@pytest.mark.parametrize("mode", ["forward", "train", "stream"])
def test_formulas_equal_what_is_counted(mode: str, method: Method, changes: dict, length: int, batch: int) -> None:
    params, dims = method.params(**changes), Dims(length, batch, 64, 4, 1, 48, position="transformer_xl")
    cost = method.cost_of("native", mode, True, "transformer_xl", params)
    for tokens in (1, 17, length):
        counted = trace(method, dims.replace(seq_len=tokens), params, "native", mode)
        values = bindings(dims.replace(seq_len=tokens), params, 4, params.segment_len)
        assert evaluate(total(cost.flops), values) == counted.flops
        assert not counted.uncounted
    if length > 500 and mode != "train":  # a byte a token is nothing then; the backward pass is that of blocked
        assert counted.peak_bytes == pytest.approx(evaluate(cost.peak_bytes, values), rel=0.03)


def test_an_empty_batch_gives_nothing_and_ends_no_process() -> None:
    none = torch.empty(0, 7, 4)
    operands = relative.Operands(none, none, none, none, torch.ones(2, 7, 4))
    out = relative_native.staircase(operands, relative.Geometry(5, 6, False, 0, 0))
    assert out.shape == none.shape
