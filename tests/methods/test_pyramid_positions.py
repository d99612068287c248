"""Positions of cells of the pyramid against a loop over pairs, and what biases cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxbench.cost import evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import trace
from ctxbench.implementations.pyramid import METHOD
from ctxbench.implementations.pyramid.blocked import OPERATORS as BLOCKED
from ctxbench.implementations.pyramid.layer import Pyramid
from ctxbench.implementations.pyramid.params import PyramidParams
from ctxbench.implementations.pyramid.reference import OPERATORS as REFERENCE
from ctxbench.method import Dims

TINY = Dims(seq_len=19, batch_size=2, d_model=16, num_heads=4, num_layers=3, d_ff=32)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("position", ["rope", "t5", "alibi"])
@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
def test_a_step_between_cells_is_as_many_tokens_as_a_cell_has(operators: Any, position: str, causal: bool) -> None:
    dims, params = TINY.replace(causal=causal, position=position), PyramidParams(levels=3, pool=3)
    torch.manual_seed(0)
    module = Pyramid(dims, params, operators).double()
    cells = torch.randn(1, 5, 4, dtype=torch.float64)
    mixer = module.layers[2].mixer  # the coarsest level: one head, cells of nine tokens
    q, k, v = (project(cells)[0] for project in (mixer.q, mixer.k, mixer.v))
    frequency = 10_000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        seen, scores = range(i + 1) if causal else range(5), []
        for j in seen:
            a, b = (torch.complex(row[:2], row[2:]) for row in (q[i], k[j]))
            turn = torch.polar(torch.ones(2, dtype=torch.float64), (i - j) * 9 * frequency * (position == "rope"))
            bias = mixer.position.bias(torch.tensor(9 * (j - i)), cells.dtype)
            scores.append((a * turn * b.conj()).real.sum() / 2 + (0 if bias is None else bias[0]))
        expected[i] = torch.stack(scores).softmax(0) @ v[seen.start : seen.stop]
    torch.testing.assert_close(mixer(cells).y[0], mixer.o(expected), rtol=0, atol=1e-12)


def test_a_rotation_needs_pairs_at_every_level() -> None:
    dims = Dims(seq_len=8, d_model=24, d_ff=0, num_heads=2, num_layers=3, position="rope")
    assert METHOD.mode_support("forward", dims.replace(position="none"), PyramidParams(levels=3))
    assert METHOD.mode_support("forward", dims, PyramidParams(levels=3))
    odd = METHOD.mode_support("forward", dims.replace(d_model=8, num_heads=1, num_layers=4), PyramidParams(levels=4))
    assert "level 3 has an odd head width of 1" in odd.reason


@pytest.mark.parametrize("mode", METHOD.modes)
def test_work_by_slabs_equals_the_formula(mode: str) -> None:
    """Levels of several slabs, calls whose new cells are not equally many, and a table a level."""
    params = PyramidParams(levels=3, pool=3)
    for length, causal in ((1100, True), (700, False)):
        dims = TINY.replace(seq_len=length, d_ff=0, causal=causal, position="t5")
        if METHOD.mode_support(mode, dims, params):
            cost, values = METHOD.cost_of("blocked", mode, causal, "t5", params), bindings(dims, params, 4, 512)
            seen = trace(METHOD, dims, params, "blocked", mode)
            assert evaluate(total(cost.flops), values) == seen.flops
            assert evaluate(cost.num_parameters, values) == seen.num_parameters


def test_biases_and_pooled_queries_exclude_each_other() -> None:
    answer = METHOD.mode_support("forward", TINY.replace(position="alibi"), PyramidParams(pooled_queries=True))
    assert "not built for pooled_queries" in answer.reason
