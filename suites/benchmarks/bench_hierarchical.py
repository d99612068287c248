"""Hierarchical attention: operators of the causal forms and the fusion of the seed form, and a whole forward call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import conv_transpose1d, linear, scaled_dot_product_attention

from ctxbench.implementations.hierarchical import METHOD
from ctxbench.implementations.hierarchical.blocked import OPERATORS as BLOCKED
from ctxbench.implementations.hierarchical.params import HierarchicalParams
from ctxbench.implementations.hierarchical.reference import OPERATORS as REFERENCE
from ctxbench.implementations.hierarchical.reference import visible
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.ratios import Comparison

DIMS = Dims(seq_len=512, d_model=64, num_heads=4, num_layers=1, d_ff=256)


def operands(length: int, params: HierarchicalParams, heads: int = 4, width: int = 64) -> tuple[Any, ...]:
    """Arguments of ``attend`` for a whole sequence."""
    levels = [torch.randn(2, 1, heads, length // span, width) for span in params.spans]
    return torch.randn(1, heads, length, width), levels, params.scales, 0


def with_dense_mask(q: torch.Tensor, levels: Any, scales: Any, start: int) -> Any:
    """What a user would write: fused attention over all tokens and cells, with an additive mask made beforehand."""
    length = q.shape[2]
    columns = [
        visible(start, length, level.shape[3], scale, q.device) for level, scale in zip(levels, scales, strict=True)
    ]
    weight = [
        torch.full((level.shape[3],), float(scale.span)).log() for level, scale in zip(levels, scales, strict=True)
    ]
    mask = torch.cat(weight).expand(length, -1).masked_fill(~torch.cat(columns, dim=1), float("-inf"))
    k, v = torch.cat(levels, dim=3)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def with_transposed_convolution(branches: Any, kernels: Any, biases: Any, weight: Any, bias: Any) -> torch.Tensor:
    """The fusion as the source document writes it."""
    columns = [branches[0]]
    for cells, kernel, shift in zip(branches[1:], kernels, biases, strict=True):
        columns.append(conv_transpose1d(cells.transpose(1, 2), kernel, shift, kernel.shape[2]).transpose(1, 2))
    return linear(torch.cat(columns, dim=2), weight, bias)


def fusion_operands(length: int, d: int) -> tuple[Any, ...]:
    """Arguments of ``fuse`` for scales 1, 4, 16."""
    branches = [torch.randn(1, length // span, d) for span in (1, 4, 16)]
    kernels = [torch.randn(d, d, span) for span in (4, 16)]
    return branches, kernels, [torch.randn(d) for _ in kernels], torch.randn(d, 3 * d), torch.randn(d)


def comparisons() -> list[Comparison]:
    """Both causal forms against fused attention with a dense mask, and the fusion against transposed convolutions."""
    compared = []
    for form, floor, aim in (("causal_linear", 4.0, 6.0), ("causal_full", 2.0, 4.0)):
        arguments = operands(4096, HierarchicalParams(form=form))
        candidates = {
            "SDPA with a dense mask": with_dense_mask(*arguments),
            "blocked": lambda arguments=arguments: BLOCKED.attend(*arguments),
        }
        title = f"hierarchical: {form}, 4k tokens, 4 heads of 64, fp32"
        compared.append(
            Comparison(title, "SDPA with a dense mask", candidates, floor={"blocked": floor}, aim={"blocked": aim})
        )
    fused = fusion_operands(4096, 256)
    candidates = {
        "transposed convolution": lambda: with_transposed_convolution(*fused),
        "reference": lambda: REFERENCE.fuse(*fused),
        "blocked": lambda: BLOCKED.fuse(*fused),
    }
    compared.append(Comparison("hierarchical: fusion of scales 1, 4, 16, 4k tokens, d = 256, fp32",
                               "transposed convolution", candidates))  # fmt: skip
    return compared


@pytest.mark.parametrize("form", ["causal_full", "causal_linear"])
@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
def test_attend(benchmark: Any, operators: Any, form: str) -> None:
    benchmark(operators.attend, *operands(1024, HierarchicalParams(form=form)))


@pytest.mark.parametrize("operators", [REFERENCE, BLOCKED], ids=["reference", "blocked"])
def test_fusion(benchmark: Any, operators: Any) -> None:
    benchmark(operators.fuse, *fusion_operands(DIMS.seq_len, DIMS.d_model))


@pytest.mark.parametrize("impl", [impl.name for impl in METHOD.impls])
def test_forward(benchmark: Any, impl: str) -> None:
    module = METHOD.make(DIMS, METHOD.params(), impl, "cpu", torch.float32).eval()
    x = torch.randn(1, DIMS.seq_len, DIMS.d_model)
    benchmark.extra_info["cell"] = f"hierarchical/{impl} T={DIMS.seq_len} d_model={DIMS.d_model}"
    with torch.no_grad():
        benchmark(module, x)
