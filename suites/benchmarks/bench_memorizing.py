"""Memorizing Transformer: one attention layer over a sequence in segments, memory included, against the public package.

The package ``memorizing-transformers-pytorch`` searches an approximate index and has one key-value head for all query
heads; ours searches exactly, for every head in a memory of its own. Both see a window or cache of 512 tokens, retrieve
32 pairs a query, write after every segment, and start with an empty memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxbench.implementations.memorizing import METHOD
from ctxbench.implementations.memorizing.params import MemorizingParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

D_MODEL, HEADS, SEGMENT, RETRIEVED = 512, 8, 512, 32
PACKAGES = ("memorizing_transformers_pytorch", "faiss", "einops", "einops_exts", "joblib", "filelock")


def layer(impl: str, length: int, params: MemorizingParams) -> torch.nn.Module:
    """The attention of one layer, without norm and feed-forward network."""
    dims = Dims(seq_len=length, d_model=D_MODEL, num_heads=HEADS, d_ff=0, position="t5")
    return METHOD.make(dims, params, impl, "cpu", torch.float32).eval().layers[0].mixer  # type: ignore[union-attr,index,return-value]


def published(length: int) -> Callable[..., Any] | None:
    """The package's layer, segment by segment, with a new memory in every call; None where it is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.stdout.write(f"left out: the package {', '.join(missing)} is not installed\n")
        return None
    package = importlib.import_module("memorizing_transformers_pytorch.memorizing_transformers_pytorch")
    new_memory = importlib.import_module("memorizing_transformers_pytorch.knn_memory").KNNMemory

    attention = package.KNNAttention(
        dim=D_MODEL, heads=HEADS, dim_head=D_MODEL // HEADS, num_retrieved_memories=RETRIEVED, xl_max_memories=SEGMENT
    ).eval()
    positions = package.T5RelativePositionBias(scale=(D_MODEL // HEADS) ** 0.5, heads=HEADS)
    folder = tempfile.TemporaryDirectory()

    def call(x: torch.Tensor) -> torch.Tensor:
        memory = new_memory(
            D_MODEL // HEADS, max_memories=length, num_indices=len(x), multiprocessing=False,
            memmap_filename=str(Path(folder.name) / "memory"),
        )  # fmt: skip
        outputs, cache = [], None
        for segment in x.split(SEGMENT, dim=1):
            keys = segment.shape[1] + (0 if cache is None else cache.shape[1])
            bias = positions(segment.shape[1], keys, device=x.device)
            y, cache = attention(segment, knn_memory=memory, xl_memory=cache, rel_pos_bias=bias)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    return call


def comparisons() -> list[Comparison]:
    """Both lookups at two lengths, against the package where it is installed, else against our reference."""
    found = []
    for length in (4096, 8192):
        x = torch.randn(1, length, D_MODEL, generator=torch.Generator().manual_seed(0))
        modules: dict[str, Callable[..., Any]] = {}
        package = published(length)
        if package is not None:
            modules["memorizing-transformers-pytorch"] = package
        for impl, lookup in (("reference", "topk"), ("blocked", "topk"), ("native", "topk"), ("blocked", "dense")):
            modules[f"memorizing/{impl} {lookup}"] = layer(impl, length, MemorizingParams(lookup=lookup))
        candidates = {name: _inference(module, x) for name, module in modules.items()}
        goals = ["memorizing/blocked topk", "memorizing/native topk"] if package is not None else []
        found.append(
            Comparison(
                f"memorizing, one layer, {length} tokens, {RETRIEVED} of up to 8192 pairs, fp32",
                next(iter(modules)), candidates,
                floor=dict.fromkeys(goals, 1.5), aim=dict.fromkeys(goals, 2.5),
            )
        )  # fmt: skip
    return found


def _inference(module: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: module(x))


@pytest.mark.parametrize("impl", ["reference", "blocked", "native"])
@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    dims = Dims(seq_len=512, d_model=64, d_ff=0, position="t5")
    params = MemorizingParams(memory_len=256, segment_len=128, window=128, top_k=16)
    module = METHOD.make(dims, params, impl, "cpu", torch.float32).eval()
    x = torch.randn(1, 512 if mode == "forward" else 1, 64)
    state = None if mode == "forward" else module.state_at(1, 512)
    benchmark.extra_info.update(method="memorizing", impl=impl, mode=mode, seq_len=512, **params.as_dict())
    with torch.no_grad():
        y = benchmark.pedantic(module, (x, state), rounds=5).y
    assert y.shape == x.shape
