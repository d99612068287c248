"""Transformer-XL, operator level: projected queries, keys, values and distances in, output out; 512 + 512 tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from ctxbench.implementations._shared import relative
from ctxbench.implementations.transformer_xl import METHOD
from ctxbench.implementations.transformer_xl.params import TransformerXLParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH, SEGMENT, MEMORY = 8, 64, 512, 512
Tensors = tuple[torch.Tensor, ...]


def draw(length: int) -> Tensors:
    """Projections as a layer's linear maps leave them: q, k, v ``[1, T, d_model]``, r ``[K, d_model]``; then u, v."""
    generator = torch.Generator().manual_seed(0)
    d_model = HEADS * WIDTH
    q, k, v = (torch.randn(1, length, d_model, generator=generator) for _ in range(3))
    r = torch.randn(min(length, SEGMENT + MEMORY), d_model, generator=generator)  # by falling distance
    u, w = (torch.randn(HEADS, WIDTH, generator=generator) for _ in range(2))
    return q, k, v, r, u, w


def one_shot(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor
) -> Any:
    """The blocked operator, its two biased queries included."""
    q, k, v = (a.unflatten(2, (HEADS, WIDTH)).permute(2, 0, 1, 3) for a in (q, k, v))  # [H, B, T, D]
    content, position = ((q + bias[:, None, None]).flatten(0, 1) for bias in (u, w))
    distances = r.unflatten(1, (HEADS, WIDTH)).transpose(0, 1)
    operands = relative.Operands(content, position, k.flatten(0, 1), v.flatten(0, 1), distances)
    return relative.staircase(operands, relative.Geometry(SEGMENT, MEMORY, same_length=False, past=0, phase=0))


def authors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor
) -> Any:
    """The published form: a loop over segments, time first, heads last, and a shift that pads, views and slices."""
    q, k, v = (a.transpose(0, 1).unflatten(2, (HEADS, WIDTH)) for a in (q, k, v))  # [T, B, H, D]
    r = r.unflatten(1, (HEADS, WIDTH))
    outputs = []
    for first in range(0, len(q), SEGMENT):
        end, oldest = min(first + SEGMENT, len(q)), max(first - MEMORY, 0)
        n, keys = end - first, end - oldest
        content = torch.einsum("ibhd,jbhd->ijbh", q[first:end] + u, k[oldest:end])
        position = padded_shift(torch.einsum("ibhd,jhd->ijbh", q[first:end] + w, r[-keys:]))
        scores = (content + position).mul_(WIDTH**-0.5)
        future = torch.ones(n, keys, dtype=torch.bool).triu(keys - n + 1)
        weights = scores.masked_fill(future[:, :, None, None], float("-inf")).softmax(dim=1)
        outputs.append(torch.einsum("ijbh,jbhd->ibhd", weights, v[oldest:end]).flatten(2))
    return torch.cat(outputs).transpose(0, 1)


def padded_shift(scores: torch.Tensor) -> torch.Tensor:
    """``[n, keys, B, H]``, by distance to by key: a column of zeros in front, then another reading of the rows."""
    n, keys, *rest = scores.shape
    padded = torch.cat((scores.new_zeros(n, 1, *rest), scores), dim=1)
    return padded.view(keys + 1, n, *rest)[1:].view(scores.shape)


def heads_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor, u: torch.Tensor, w: torch.Tensor
) -> Any:
    """The same padded shift in the layout that suits a CPU: what remains is the gain of the schedule alone."""
    q, k, v = (a[0].unflatten(1, (HEADS, WIDTH)).transpose(0, 1) for a in (q, k, v))  # [H, T, D]
    r = r.unflatten(1, (HEADS, WIDTH)).transpose(0, 1)
    outputs = []
    for first in range(0, q.shape[1], SEGMENT):
        end, oldest = min(first + SEGMENT, q.shape[1]), max(first - MEMORY, 0)
        n, keys = end - first, end - oldest
        content = (q[:, first:end] + u[:, None]) @ k[:, oldest:end].transpose(1, 2)
        position = (q[:, first:end] + w[:, None]) @ r[:, -keys:].transpose(1, 2)
        position = torch.cat((position.new_zeros(HEADS, n, 1), position), dim=2)
        position = position.view(HEADS, keys + 1, n)[:, 1:].view(HEADS, n, keys)
        future = torch.ones(n, keys, dtype=torch.bool).triu(keys - n + 1)
        scores = ((content + position) * WIDTH**-0.5).masked_fill(future, float("-inf"))
        outputs.append((scores.softmax(dim=2) @ v[:, oldest:end]).transpose(0, 1).flatten(1))
    return torch.cat(outputs)[None]


def comparisons() -> list[Comparison]:
    """Against the published form, at two lengths."""
    found = []
    for length in (4096, 8192):
        tensors = draw(length)
        forms = {"authors' padded shift": authors, "padded shift, heads first": heads_first}
        candidates = {name: functools.partial(form, *tensors) for name, form in forms.items()}
        candidates["transformer_xl/blocked"] = torch.no_grad()(functools.partial(one_shot, *tensors))
        found.append(
            Comparison(
                f"transformer_xl, {length} tokens, segments of {SEGMENT}, memory {MEMORY}, fp32",
                "authors' padded shift", candidates,
                floor={"transformer_xl/blocked": 2.5}, aim={"transformer_xl/blocked": 4.0},
            )
        )  # fmt: skip
    return found


def test_forms_compute_the_same(benchmark: Any) -> None:
    tensors = draw(1300)
    ours = one_shot(*tensors).transpose(0, 1).flatten(1)[None]
    expected = benchmark.pedantic(authors, tensors, rounds=1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heads_first(*tensors), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "blocked", "as_written"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims, params = Dims(seq_len=512, d_model=64, d_ff=0), TransformerXLParams(segment_len=128, mem_len=128)
    module = METHOD.make(dims, params, impl, "cpu", torch.float32).eval()
    x = torch.randn(1, 512 if mode == "forward" else 1, 64)
    state = None if mode == "forward" else module.state_at(1, 512)
    benchmark.extra_info.update(
        method="transformer_xl", impl=impl, mode=mode, seq_len=512, segment_len=128, mem_len=128
    )
    with torch.no_grad():
        y = benchmark.pedantic(module, (x, state), rounds=10).y
    assert y.shape == x.shape
