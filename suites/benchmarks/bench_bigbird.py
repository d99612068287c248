"""BigBird attention, operator level: q, k, v in, output out; the plan of blocks is made beforehand."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.bigbird import blocked, native, reference
from ctxbench.implementations.bigbird.layer import BigBirdAttention, Plan
from ctxbench.implementations.bigbird.params import BigBirdParams
from ctxbench.method import Dims
from ctxbench.suites.benchmarks.bench_peak import products
from ctxbench.suites.benchmarks.ratios import Comparison

HEADS, WIDTH, PARAMS = 4, 64, BigBirdParams()
IMPLS = {"reference": reference.attend, "blocked": blocked.attend, "native": native.attend}


def operands(length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values as projections leave them: ``[1, H, T, D]``, stored token by token."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(1, length, HEADS, WIDTH, generator=generator).to(dtype) for _ in range(3)]
    return [row.transpose(1, 2) for row in rows]


def plan(length: int) -> Plan:
    """The plan of the first layer."""
    dims = Dims(seq_len=length, d_model=HEADS * WIDTH, num_heads=HEADS, causal=False)
    mixer = BigBirdAttention(dims, PARAMS, 0, None, Position())
    return Plan(PARAMS.block_size, mixer.pattern.num_blocks, mixer.edges, mixer.inner)  # type: ignore[arg-type]


def visible_pairs(length: int) -> int:
    """Pairs a head sees, ``length`` a multiple of the block."""
    blocks, size, drawn = length // PARAMS.block_size, PARAMS.block_size, PARAMS.num_random
    return size**2 * (blocks * (7 + drawn) - 12 - 2 * drawn)


def flex(length: int) -> Callable[..., Any]:
    """Compiled FlexAttention with the same blocks, all of them without a mask."""
    pattern = PARAMS.pattern(length)
    blocks = pattern.num_blocks
    counts = torch.zeros(1, HEADS, blocks, dtype=torch.int32)
    indices = torch.zeros(1, HEADS, blocks, blocks, dtype=torch.int32)
    for head in range(HEADS):
        for row, columns in enumerate(pattern.sees(0, head)):
            counts[0, head, row] = len(columns)
            indices[0, head, row, : len(columns)] = torch.tensor(columns)
    nothing = torch.zeros_like(counts), torch.zeros_like(indices)
    mask = BlockMask.from_kv_blocks(*nothing, counts, indices, BLOCK_SIZE=PARAMS.block_size)
    return functools.partial(torch.compile(flex_attention), block_mask=mask)


def published(length: int) -> Callable[..., Any] | None:
    """The operator of the package transformers, as its layer calls it; None where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        sys.stdout.write("left out: the package transformers is not installed\n")
        return None
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    size, count = PARAMS.block_size, PARAMS.num_random
    config = BigBirdConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, block_size=size, num_random_blocks=count,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = BigBirdBlockSparseAttention(config, seed=0).train()  # evaluation mode draws no blocks
    blocks, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, length), size)
    sizes = (HEADS, count, WIDTH, size, size, 1, length, length)

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return layer.bigbird_block_sparse_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), band, rows, columns, blocks, blocks, *sizes,
            seed=0, plan_from_length=None, plan_num_rand_blocks=None,
        )  # fmt: skip

    return operator


def comparisons() -> list[Comparison]:
    """``blocked`` against compiled FlexAttention, a dense mask, and the package transformers."""
    found = []
    length = 8192
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        q, k, v = operands(length, dtype)
        candidates = {
            "compiled FlexAttention": functools.partial(flex(length), q, k, v),
            "bigbird/blocked": functools.partial(blocked.attend, q, k, v, plan(length)),
        }
        title = f"bigbird attention, {length} tokens, blocks of 64, 3 random, {name}"
        floor, aim = {"bigbird/blocked": 1.2}, {"bigbird/blocked": 2.0}
        found.append(Comparison(title, "compiled FlexAttention", candidates, floor, aim))
    length = 4096
    q, k, v = operands(length)
    visible = reference.visible(plan(length), length)
    candidates = {
        "SDPA, dense mask ready": functools.partial(
            torch.nn.functional.scaled_dot_product_attention, q, k, v, attn_mask=visible
        ),
        "bigbird/blocked": functools.partial(blocked.attend, q, k, v, plan(length)),
    }
    found.append(Comparison(f"bigbird attention, {length} tokens, fp32", "SDPA, dense mask ready", candidates))
    theirs = published(8192)
    if theirs is not None:
        q, k, v = operands(8192)
        others: dict[str, Callable[[], Any]] = {
            "transformers, block sparse": functools.partial(theirs, q, k, v),
            "bigbird/native": functools.partial(native.attend, q, k, v, plan(8192)),
            # Of its 46 ms two threads spend 24 on products of the slabs and 5 on their softmax, 9 on the global rows,
            # 6 on keys and values by block and gathering those a slab sees, 2 on the rest.
            # No gain: global rows by the fused kernel; slabs as fused attention (33 to 40 for 30); one head at a time
            # (1 % slower with 4 heads, 6 % faster with 8 in fp32, in bf16 an eighth slower); window, global and random
            # blocks as products of their own, the first two read where they lie, with a softmax over all three by
            # exp2 (2 % slower: four times the calls). Scores have to be one piece for a batched product, so keys cannot
            # be read in place: that is what native is for. Global rows by runs of keys with a softmax by exp2 take
            # 8 ms, in fp32 alone.
            "bigbird/blocked": functools.partial(blocked.attend, q, k, v, plan(8192)),
            # A bound: the same FLOPs, without softmax or gathering.
            "visible pairs as one product": products(4 * WIDTH * HEADS * visible_pairs(8192), torch.float32),
        }
        floor, aim = {"bigbird/native": 4.0}, {"bigbird/native": 8.0}
        title = "bigbird attention, 8192 tokens, fp32"
        found.append(Comparison(title, "transformers, block sparse", others, floor, aim))
    return found


@pytest.mark.parametrize("impl", IMPLS)
def test_attend(benchmark: Any, impl: str) -> None:
    q, k, v = operands(1024)
    benchmark.extra_info.update(method="bigbird", impl=impl, tokens=1024)
    y = benchmark.pedantic(IMPLS[impl], (q, k, v, plan(1024)), rounds=10, warmup_rounds=2)
    assert y.shape == q.shape
