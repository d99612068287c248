"""Positions of cells of hierarchical attention against a loop over single keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ctxbench.implementations.hierarchical import METHOD
from ctxbench.implementations.hierarchical.params import HierarchicalParams
from ctxbench.method import Dims

TINY = Dims(seq_len=29, d_model=16, num_heads=4, d_ff=32, position="rope")
FORMS = (
    HierarchicalParams(window=5, pool=3),
    HierarchicalParams(form="causal_linear", window=6, cells=2, pool=2),
)


@pytest.mark.parametrize("position", ["rope", "t5", "alibi"])
@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("params", FORMS, ids=["full", "linear"])
def test_a_cell_is_where_its_last_token_is(impl: str, params: HierarchicalParams, position: str) -> None:
    dims = TINY.replace(position=position)
    mixer = METHOD.make(dims, params, impl, "cpu", torch.float64).layers[0].mixer
    x = torch.randn(1, 29, 16, dtype=torch.float64)
    q, k, v = (project(x).view(29, 4, 4) for project in (mixer.q, mixer.k, mixer.v))

    def turned(row: torch.Tensor, place: int) -> torch.Tensor:
        if position != "rope":
            return row
        angle = [place * 10_000 ** (-n / 2) for n in range(2)]
        pair = torch.view_as_complex(torch.stack((row[:2], row[2:]), dim=1).contiguous())
        pair = pair * torch.polar(torch.ones(2).double(), torch.tensor(angle, dtype=torch.float64))
        return torch.cat((pair.real, pair.imag))

    expected = torch.zeros(29, 4, 4, dtype=torch.float64)
    for i, head in itertools.product(range(29), range(4)):
        scores, values = [], []
        for scale in params.scales:
            for cell in scale.sees(i):
                tokens = slice(cell * scale.span, (cell + 1) * scale.span)
                key = turned(k[tokens, head].mean(dim=0), tokens.stop - 1)  # never the mean of what was turned
                bias = mixer.position.bias(torch.tensor(tokens.stop - 1 - i), x.dtype)
                added = math.log(scale.span) + (0 if bias is None else bias[head])
                scores.append(turned(q[i, head], i) @ key / 2 + added)
                values.append(v[tokens, head].mean(dim=0))
        expected[i, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    found = mixer(x).y
    torch.testing.assert_close(found, mixer.o(expected.view(1, 29, 16)), rtol=0, atol=1e-12)


def test_positions_are_not_for_the_source_documents_form() -> None:
    dims = TINY.replace(causal=False)
    assert "knows no positions" in METHOD.mode_support("forward", dims, HierarchicalParams(form="seed")).reason
    sketch = METHOD.impl_support(METHOD.impl("as_written"), "forward", dims, FORMS[0], "cpu", "fp32")
    assert sketch.reason == "as_written takes the positions none, not rope"


@pytest.mark.parametrize("params", FORMS, ids=["full", "linear"])
def test_gradients_of_a_table_by_slabs_equal_those_of_the_whole_rectangle(params: HierarchicalParams) -> None:
    dims, results = TINY.replace(seq_len=301, position="t5"), []
    x = torch.randn(2, 301, 16, dtype=torch.float64)
    for impl in ("reference", "blocked"):
        torch.manual_seed(0)
        module, own = METHOD.make(dims, params, impl, "cpu", torch.float64), x.clone().requires_grad_()
        module(own).y.backward(x.flip(1))
        results.append([own.grad, *(parameter.grad for parameter in module.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
