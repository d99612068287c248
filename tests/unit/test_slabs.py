"""Attention by slabs of queries: wherever the first query stands, against the whole rectangle, with all gradients."""

from __future__ import annotations

import pytest
import torch

from ctxbench.implementations._shared import slabs
from ctxbench.implementations._shared.positions import RelativeTerm, positions_for, sinusoids
from ctxbench.method import Dims

WITHIN = [(11, 11, None), (6, 11, None), (6, 11, 2)]  # queries, keys, keys before the first query's own
BEYOND = [(6, 11, 9), (11, 9, 4), (5, 7, 40)]
PLACES = [
    *((name, *place, causal) for name in ("t5", "alibi") for place in WITHIN for causal in (True, False)),
    *((name, *place, False) for name in ("t5", "alibi") for place in BEYOND),
    *(("transformer_xl", *place, causal) for place in WITHIN[:2] for causal in (True, False)),
]


def rectangle(q, k, v, causal, position, step, before):
    """All scores at once; ``away`` is the distance from each key to each query, in positions."""
    away = before + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    scale = q.shape[3] ** -0.5
    if isinstance(position, RelativeTerm):
        rows = position.r(sinusoids(away.double(), position.r.in_features)).unflatten(2, (q.shape[1], -1))
        scores = (q + position.content_bias[:, None]) @ k.transpose(2, 3) * scale
        scores = scores + torch.einsum("bhid,ijhd->bhij", q + position.position_bias[:, None], rows) * scale
    else:
        scores = q @ k.transpose(2, 3) * scale + position.bias(-away * step, q.dtype)
    return scores.masked_fill((away < 0) & causal, float("-inf")).softmax(dim=3) @ v


@pytest.mark.parametrize(("name", "queries", "keys", "before", "causal"), PLACES)
def test_equal_the_rectangle_wherever_the_first_query_stands(name, queries, keys, before, causal, monkeypatch):
    monkeypatch.setattr(slabs, "BLOCK", 4)
    torch.manual_seed(0)
    (position,) = positions_for(Dims(64, d_model=12, num_heads=3, position=name, causal=causal))
    position, step = position.double(), 3 if name == "alibi" else 1
    lengths = (queries, keys, keys)
    operands = [torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in lengths]
    inputs = [*operands, *position.parameters()]
    outputs = (
        slabs.attend_slabs(*operands, causal, position, step, before),
        rectangle(*operands, causal, position, step, keys - queries if before is None else before),
    )
    found = ([y, *torch.autograd.grad(y, inputs, y.detach().cos())] for y in outputs)
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)
