"""Longformer, operator level: q, k, v in, output out; 512 keys a query."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared import window_blocks as blocked
from ctxbench.implementations._shared import window_ranges as native
from ctxbench.implementations._shared.window import GlobalRows, Scattered
from ctxbench.implementations.longformer import METHOD, reference
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.bench_peak import products
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH, LENGTH, WINDOW = 8, 64, 8192, 512
FLEX = {torch.float32: (1.1, 1.5), torch.bfloat16: (2.0, 3.5)}  # least ratio and aim
IMPLS = {"reference": reference.attend, "blocked": blocked.attend, "native": native.attend}


def operands(
    length: int, num_global: int = 0, heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, GlobalRows, Scattered]:
    """Heads split from ``[B, T, d_model]`` projections, as a layer hands them over, and the rows of a causal prefix."""
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(1, length, heads, WIDTH, generator=generator).to(dtype) for _ in range(3))
    q, k, v = (draw.transpose(1, 2) for draw in draws)
    prefix = slice(num_global)
    rows = GlobalRows(q[:, :, prefix], k[:, :, prefix], v[:, :, prefix], tuple(range(num_global)))
    return q, k, v, rows, Scattered(k[:, :, :0], v[:, :, :0], ())


def ours(*arguments: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """The fast impls on the same operands."""
    fast = {"longformer/blocked": blocked.attend, "longformer/native": native.attend}
    return {name: functools.partial(attend, *arguments) for name, attend in fast.items()}


def comparisons() -> list[Comparison]:
    """Against dense attention, and against the package transformers where it is installed."""
    found = []
    q, k, v, rows, none = operands(LENGTH)
    for causal in (False, True):
        pattern = LongformerParams(window=WINDOW, num_global=0).pattern(causal)
        fast = ours(q, k, v, rows, none, pattern)
        candidates: dict[str, Callable[[], Any]] = {
            "dense SDPA": functools.partial(scaled_dot_product_attention, q, k, v),
            "dense SDPA, causal": functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True),
            **fast,
        }
        direction = "causal window" if causal else "window on both sides"
        found.append(
            Comparison(
                f"longformer, {LENGTH} tokens, {WINDOW} keys a query, {direction}, fp32", "dense SDPA", candidates,
                floor=dict.fromkeys(fast, 6.0), aim=dict.fromkeys(fast, 9.0),
            )
        )  # fmt: skip
    found += [_against_flex(dtype) for dtype in FLEX]
    found.append(_against_a_mask())
    if importlib.util.find_spec("transformers") is not None:
        pattern = LongformerParams(window=WINDOW, num_global=0).pattern(causal=False)
        fast = ours(q, k, v, rows, none, pattern)
        ours_and_theirs: dict[str, Callable[[], Any]] = {"transformers": _transformers(q, k, v), **fast}
        title = f"longformer, {LENGTH} tokens, {WINDOW} + 1 keys a query, fp32, without projections"
        floor, aim = dict.fromkeys(fast, 2.0), dict.fromkeys(fast, 4.0)
        found.append(Comparison(title, "transformers", ours_and_theirs, floor=floor, aim=aim))
    return found


def _against_flex(dtype: torch.dtype) -> Comparison:
    """Compiled FlexAttention with the same window; the compiler runs before the rounds, in the check of equality."""
    pattern = LongformerParams(window=WINDOW, num_global=0).pattern(causal=False)
    q, k, v, rows, none = operands(LENGTH, dtype=dtype)

    def visible(batch: Any, head: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i - j <= pattern.left) & (j - i <= pattern.right)

    mask = create_block_mask(visible, None, None, LENGTH, LENGTH, device="cpu")
    flex = torch.no_grad()(functools.partial(torch.compile(flex_attention), q, k, v, block_mask=mask))
    candidates = ours(q, k, v, rows, none, pattern)
    for attend in candidates.values():
        torch.testing.assert_close(attend(), flex(), rtol=0.02, atol=0.02)
    name = "fp32" if dtype == torch.float32 else "bf16"
    floor, aim = FLEX[dtype]
    return Comparison(
        f"longformer, {LENGTH} tokens, {WINDOW} + 1 keys a query, {name}", "compiled FlexAttention",
        {"compiled FlexAttention": flex, **candidates}, floor={"longformer/native": floor},
        aim={"longformer/native": aim},
    )  # fmt: skip


def _against_a_mask() -> Comparison:
    """What a user writes first: fused attention with a dense mask of the window; and two bounds.

    The first is a plain product of as many FLOPs as the visible pairs take, without any softmax. The second is what
    ``blocked`` repeats, two products and a softmax, on one block's operands; ``native`` goes below it, since its scores
    never leave the innermost cache.
    """
    pattern = LongformerParams(window=WINDOW, num_global=0).pattern(causal=False)
    q, k, v, rows, none = operands(4096)
    distance = torch.arange(4096)[:, None] - torch.arange(4096)
    mask = (distance <= pattern.left) & (distance >= -pattern.right)
    candidates: dict[str, Callable[[], Any]] = {
        "SDPA with a dense mask": functools.partial(scaled_dot_product_attention, q, k, v, attn_mask=mask),
        **ours(q, k, v, rows, none, pattern),
        "visible pairs as one product": products(4 * HEADS * WIDTH * int(mask.sum()), torch.float32),
        "a block's products and softmax": functools.partial(_core, 4096 // blocked.BLOCK),
    }
    return Comparison(
        f"longformer, 4096 tokens, {WINDOW} + 1 keys a query, fp32, the mask made beforehand", "SDPA with a dense mask",
        candidates, floor={"longformer/native": 6}, aim={"longformer/native": 10},
    )  # fmt: skip


def _core(count: int) -> None:
    """Scores, softmax and values of so many blocks, in place on the same operands."""
    query, keys = torch.zeros(HEADS, blocked.BLOCK, WIDTH), torch.zeros(HEADS, WINDOW + blocked.BLOCK, WIDTH)
    scores = torch.zeros(HEADS, blocked.BLOCK, WINDOW + blocked.BLOCK)
    for _ in range(count):
        scores.baddbmm_(query, keys.transpose(1, 2), beta=0)
        query.baddbmm_(torch.softmax(scores, dim=2, out=scores), keys, beta=0)


class _Given(torch.nn.Module):
    """A projection that returns a tensor; a fresh copy, because the package divides its queries in place."""

    def __init__(self, projected: torch.Tensor):
        super().__init__()
        self.projected = projected.transpose(1, 2).reshape(1, LENGTH, HEADS * WIDTH).transpose(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projected.clone()


def _transformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attention_window=[WINDOW])
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    layer.query, layer.key, layer.value = _Given(q), _Given(k), _Given(v)
    x, mask = torch.empty(1, LENGTH, HEADS * WIDTH), torch.zeros(1, LENGTH)
    call = functools.partial(
        layer, x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=False
    )
    return torch.no_grad()(call)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("queries", [1, 256], ids=["decode", "chunk"])
def test_attend(benchmark: Any, impl: str, queries: int) -> None:
    q, k, v, rows, none = operands(512, heads=4)
    pattern = LongformerParams(window=128, num_global=0).pattern(causal=True)
    last = q[:, :, -queries:]
    benchmark.extra_info.update(method="longformer", impl=impl, queries=queries, keys=512, window=128)
    y = benchmark.pedantic(IMPLS[impl], (last, k, v, GlobalRows(q[:, :, :0], *rows[1:]), none, pattern), rounds=20)
    assert y.shape == last.shape


def test_sketch(benchmark: Any) -> None:
    dims, params = Dims(seq_len=256, d_model=64, d_ff=0), LongformerParams(window=128, num_global=4)
    module = METHOD.make(dims, params, "as_written", "cpu", torch.float32).eval()
    x = torch.randn(1, 256, 64)
    benchmark.extra_info.update(method="longformer", impl="as_written", queries=256, keys=256, window=128)
    with torch.no_grad():
        benchmark.pedantic(module, (x,), rounds=10)
