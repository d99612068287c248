"""Biases by distance between gathered blocks against those of all pairs."""

from __future__ import annotations

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.bigbird import METHOD
from ctxbench.implementations.bigbird.params import BigBirdParams
from ctxbench.method import Dims

TINY = Dims(seq_len=53, batch_size=2, d_model=16, num_heads=2, num_layers=2, d_ff=24, causal=False)
SIZES = {  # parameters and a length
    "short last block": (BigBirdParams(block_size=4, num_random=2), 53),
    "rows of several pieces": (BigBirdParams(block_size=270, num_random=0), 1450),
    "two blocks": (BigBirdParams(block_size=100), 190),
}


@pytest.mark.parametrize("position", ["t5", "alibi"])
@pytest.mark.parametrize("name", SIZES)
def test_biases_of_gathered_blocks_equal_those_of_all_pairs(name: str, position: str) -> None:
    params, length = SIZES[name]
    dims, results = TINY.replace(seq_len=length, num_layers=1, d_ff=0, position=position), []
    x = torch.randn(2, length, 16, dtype=torch.float64)
    for impl in ("reference", "blocked"):
        torch.manual_seed(0)
        module, own = METHOD.make(dims, params, impl, "cpu", torch.float64), x.clone().requires_grad_()
        y = module(own).y
        y.backward(x.flip(1))
        results.append([y.detach(), own.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", METHOD.modes)
@pytest.mark.parametrize("name", SIZES)
def test_biases_cost_no_products_and_one_table(name: str, mode: str) -> None:
    params, length = SIZES[name]
    dims = TINY.replace(seq_len=length, position="t5")
    for impl in ("reference", "blocked"):
        cost, values = METHOD.cost_of(impl, mode, False, "t5", params), bindings(dims, params, 4, 512)
        seen = trace(METHOD, dims, params, impl, mode)
        assert evaluate(total(cost.flops), values) == seen.flops
        assert evaluate(cost.num_parameters, values) == seen.num_parameters


def test_a_bias_changes_what_a_token_sees_by_its_distance() -> None:
    params, length = SIZES["short last block"]
    torch.manual_seed(0)
    plain = METHOD.make(TINY, params, "blocked", "cpu", torch.float64)
    biased = METHOD.make(TINY.replace(position="alibi"), params, "blocked", "cpu", torch.float64)
    biased.load_state_dict(plain.state_dict())
    x = torch.randn(1, length, 16, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(plain(x).y, biased(x).y, rtol=0, atol=1e-3)
