"""Compressive Transformer: a whole sequence in one layer, against the public PyTorch package and our own loop."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from ctxbench.implementations.compressive_transformer import METHOD
from ctxbench.implementations.compressive_transformer.params import CompressiveTransformerParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison
from ctxbench.workload import prepare

PACKAGE = "compressive_transformer_pytorch"
LENGTH, WIDTH, HEADS = 8192, 512, 8
PARAMS = CompressiveTransformerParams()


def package() -> Any:
    """The package at equal work: one layer, plain residuals, its loop over segments, two logits."""
    from compressive_transformer_pytorch import CompressiveTransformer

    model = CompressiveTransformer(
        num_tokens=2, dim=WIDTH, seq_len=PARAMS.segment_len, depth=1, mem_len=PARAMS.mem_len,
        cmem_len=PARAMS.compressed_len, cmem_ratio=PARAMS.rate, heads=HEADS, gru_gated_residual=False,
        enhanced_recurrence=False,
    ).eval()  # fmt: skip
    tokens = torch.randint(0, 2, (1, LENGTH))

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        outputs, memories = [], None
        for segment in tokens.split(PARAMS.segment_len, dim=1):
            logits, memories, _ = model(segment, memories=memories)
            outputs.append(logits)
        return outputs

    return run


def package_attention() -> Any:
    """Its attention alone, memories and compression included, without embedding, network and logits."""
    from compressive_transformer_pytorch.compressive_transformer_pytorch import SelfAttention

    sizes = (PARAMS.segment_len, PARAMS.mem_len, PARAMS.compressed_len)
    attention = SelfAttention(WIDTH, *sizes, PARAMS.rate, HEADS).eval()
    positions = torch.randn(HEADS, sum(sizes), WIDTH // HEADS)
    x = torch.randn(1, LENGTH, WIDTH)

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        outputs, memories = [], None
        for segment in x.split(PARAMS.segment_len, dim=1):
            y, memories, _ = attention(segment, memories=memories, pos_emb=positions)
            outputs.append(y)
        return outputs

    return run


def layer(impl: str, d_ff: int = 4 * WIDTH) -> Any:
    dims = Dims(seq_len=LENGTH, d_model=WIDTH, num_heads=HEADS, d_ff=d_ff, position="transformer_xl")
    return prepare(METHOD, dims, PARAMS, impl, "forward", "fp32").call


def comparisons() -> list[Comparison]:
    """The fast impls against the package where it is installed, and against ``reference``; with and without network."""
    loop, found = "compressive_transformer/reference", []
    for what, d_ff, theirs in (("layer", 4 * WIDTH, package), ("attention", 0, package_attention)):
        title = f"compressive transformer, one {what}, {LENGTH} tokens, segments of {PARAMS.segment_len}, fp32"
        candidates = {
            f"compressive_transformer/{impl}": layer(impl, d_ff) for impl in ("reference", "blocked", "native")
        }
        if importlib.util.find_spec(PACKAGE) is None:
            found.append(Comparison(f"{title}; {PACKAGE} is not installed and left out", loop, candidates))
            continue
        candidates, name = {PACKAGE: theirs(), **candidates}, "compressive_transformer/native"
        found.append(Comparison(title, PACKAGE, candidates, floor={name: 1.5}, aim={name: 2.5}))
    return found


@pytest.mark.parametrize(
    ("impl", "mode"),
    [*itertools.product(("reference", "blocked"), ("forward", "train", "decode")), ("native", "forward")],
)
def test_layer(benchmark: Any, impl: str, mode: str) -> None:
    params = CompressiveTransformerParams(segment_len=64, mem_len=64, compressed_len=64)
    dims = Dims(seq_len=512, d_model=64, d_ff=128, position="transformer_xl")
    work = prepare(METHOD, dims, params, impl, mode, "fp32")
    benchmark.extra_info.update(method="compressive_transformer", impl=impl, mode=mode, seq_len=512, compressed_len=64)
    y = benchmark.pedantic(work.call, rounds=10, warmup_rounds=2)
    assert y.shape == (1, 1 if mode == "decode" else 512, 64)
