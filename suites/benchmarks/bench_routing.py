"""Routing Transformer, routed heads, operator level: queries and values in, output out; the routing is part of it.

What differs from the package ``routing-transformer``, whose selection is topw: it multiplies whole squares of a
cluster, hides half of them by comparing positions, and computes the commitment loss in every call, which it has no
switch for; ours multiplies the triangle in tiles of 64 queries. Both normalise the keys in the call. ``strict`` is
another function, with as many pairs.

Of ``blocked``, at 8,192 tokens and 16 clusters, the tiles are 2.42 GFLOP, 13 ms on two cores that reach 190 GFLOP/s,
and the softmax of their 9.4 M scores 3 ms: about half of its time. Normalising keys and choosing tokens take 5 ms,
gathering rows and taking means 5 ms, and starting some 300 operators 2 ms. ``native`` has one operator for all
clusters.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.routing import METHOD, blocked, native, reference
from ctxbench.implementations.routing.layer import Operators, Rules
from ctxbench.implementations.routing.params import RoutingParams
from ctxbench.implementations.routing.routing import assigned, normalised
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH, PLAIN = 4, 64, Position()
IMPLS = {"reference": reference.OPERATORS, "blocked": blocked.OPERATORS, "native": native.OPERATORS}
SIZES = ((8192, 16), (12288, 48))  # tokens and clusters of the published enwik8 models


def draw(length: int, clusters: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries and values as projections leave them, stored token by token, and centroids of unit length."""
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, length, HEADS, WIDTH, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    return q, v, normalize(torch.randn(HEADS, clusters, WIDTH, generator=generator), dim=-1).to(dtype)


@torch.no_grad()
def topw(operators: Operators, q: torch.Tensor, v: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """What the package computes: keys are normalised queries, no token sees itself."""
    clusters, k = means.shape[1], normalize(q, dim=-1)
    ids = operators.taken(k, means, q.shape[2] // clusters)
    return operators.topw(q, k, v, ids, ids, Rules(clusters, earlier=True, exclude_self=True), PLAIN)


@torch.no_grad()
def strict(operators: Operators, q: torch.Tensor, v: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The causal form."""
    k = normalised(q)
    ids = assigned(k, means)
    return operators.strict(k, k, v, ids, ids, Rules(means.shape[1], earlier=True, exclude_self=False), PLAIN)


def published(means: torch.Tensor, length: int) -> Callable[..., torch.Tensor] | None:
    """KmeansAttention of the package routing-transformer; None where it is not installed."""
    if importlib.util.find_spec("routing_transformer") is None:
        sys.stdout.write("left out: the package routing-transformer is not installed\n")
        return None
    from routing_transformer.routing_transformer import KmeansAttention

    clusters = means.shape[1]
    layer = KmeansAttention(clusters, length // clusters, HEADS, WIDTH, causal=True, shared_qk=True).to(means.dtype)
    layer.eval().kmeans.means.copy_(means)
    layer.kmeans.initted.fill_(True)

    @torch.no_grad()
    def operator(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = layer(q, q, v)[0]
        return mixed

    return operator


def comparisons() -> list[Comparison]:
    """The fast impls against the reference and the package."""
    found = []
    for (length, clusters), dtype in ((size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)):
        q, v, means = draw(length, clusters, dtype)
        theirs = published(means, length)
        candidates: dict[str, Callable[[], Any]] = {
            "routing/reference, topw": functools.partial(topw, reference.OPERATORS, q, v, means),
            "routing/blocked, topw": functools.partial(topw, blocked.OPERATORS, q, v, means),
            "routing/blocked, strict": functools.partial(strict, blocked.OPERATORS, q, v, means),
            "routing/native, topw": functools.partial(topw, native.OPERATORS, q, v, means),
            "routing/native, strict": functools.partial(strict, native.OPERATORS, q, v, means),
        }
        title = f"routed heads, {length} tokens, {clusters} clusters, {str(dtype).removeprefix('torch.')}"
        if theirs is None:
            found.append(Comparison(title, "routing/reference, topw", candidates))
            continue
        candidates["routing-transformer"] = functools.partial(theirs, q, v)
        ours = [name for name in candidates if "native" in name] if dtype == torch.float32 else []
        floor, aim = dict.fromkeys(ours, 3.0), dict.fromkeys(ours, 6.0)
        found.append(Comparison(title, "routing-transformer", candidates, floor, aim))
    return found


@pytest.mark.parametrize("form", [topw, strict])
@pytest.mark.parametrize("impl", IMPLS)
def test_routed_heads(benchmark: Any, impl: str, form: Callable[..., torch.Tensor]) -> None:
    q, v, means = draw(1024, 8)
    benchmark.extra_info.update(method="routing", impl=impl, form=form.__name__, tokens=1024)
    y = benchmark.pedantic(form, (IMPLS[impl], q, v, means), rounds=10, warmup_rounds=2)
    assert y.shape == q.shape


@pytest.mark.parametrize(
    ("impl", "mode"), [*itertools.product(("reference", "blocked"), ("forward", "decode")), ("native", "forward")]
)
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims, params = Dims(seq_len=512, d_model=64, d_ff=0), RoutingParams(num_clusters=8, local_block=64)
    module = METHOD.make(dims, params, impl, "cpu", torch.float32).eval()
    x = torch.randn(1, 512 if mode == "forward" else 1, 64)
    state = None if mode == "forward" else module.state_at(1, 512)
    benchmark.extra_info.update(method="routing", impl=impl, mode=mode, seq_len=512, num_clusters=8)
    with torch.no_grad():
        y = benchmark.pedantic(module, (x, state), rounds=10).y
    assert y.shape == x.shape
