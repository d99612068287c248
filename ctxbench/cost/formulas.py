"""FLOP formulas for operators that torch's counter is blind to. Needs torch; registering is idempotent.

Convention: ``is_causal`` attention is charged for the pairs its alignment makes visible (the fused kernels skip the
tiles beyond the diagonal); attention with a mask tensor is charged for the whole rectangle, which is what runs;
FlexAttention is charged for the tiles that its block mask keeps. A transform of n points is 5 n log2 n, half for real
input or output.

A custom operator of a plug-in gets its formula the same way, before it is first traced::

    @ctxbench.cost.formulas.formula(torch.ops.mine.scores)
    def scores_flops(q, k, out, **_):
        return 2 * q.numel() * k.shape[-2]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.flop_counter import flop_registry

FORMULAS: dict[Any, Any] = {}  # ours first, torch's registry second: the tracer looks here
aten = torch.ops.aten


def formula(*operators: Any) -> Any:
    """Register ``f(*args, out, **kwargs) -> int`` for operators; tensors arrive as tensors."""

    def register(function: Any) -> Any:
        for operator in operators:
            FORMULAS[operator] = function
        return function

    return register


def lookup(operator: Any) -> Any:
    """Return ``f(args, kwargs, out) -> int`` for an operator overload, or None."""
    packet = getattr(operator, "overloadpacket", operator)
    own = FORMULAS.get(packet) or FORMULAS.get(operator)
    if own is not None:
        return lambda args, kwargs, out: own(*args, out=out, **kwargs)
    registered = flop_registry.get(packet) or flop_registry.get(operator)
    if registered is not None:
        return lambda args, kwargs, out: registered(*args, **kwargs, out_val=out)
    return None


def _sdpa_pairs(queries: int, keys: int, causal: bool) -> int:
    if not causal:
        return queries * keys
    visible = min(queries, keys)  # top-left aligned, as torch defines it
    return visible * (visible + 1) // 2 + (queries - visible) * keys


def _sdpa(q: Any, k: Any, v: Any, causal: bool) -> int:
    batch, heads, queries, width = q.shape
    pairs = _sdpa_pairs(queries, k.shape[2], causal)
    return int(2 * batch * heads * pairs * (width + v.shape[3]))


@formula(aten._scaled_dot_product_flash_attention_for_cpu)
def _flash_cpu(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    return _sdpa(q, k, v, is_causal)


@formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _flash_cpu_backward(
    grad: Any, q: Any, k: Any, v: Any, out_: Any, lse: Any, dropout_p: float, is_causal: bool, **_: Any
) -> int:
    return _sdpa(q, k, v, is_causal) * 5 // 2


@formula(aten._scaled_dot_product_flash_attention)
def _flash_cuda(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, *_: Any, **__: Any) -> int:
    return _sdpa(q, k, v, is_causal)


@formula(aten._scaled_dot_product_efficient_attention)
def _efficient_cuda(
    q: Any, k: Any, v: Any, bias: Any, lse: bool, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    return _sdpa(q, k, v, is_causal)


@formula(aten._scaled_dot_product_cudnn_attention)
def _cudnn(
    q: Any, k: Any, v: Any, bias: Any, lse: bool, dropout_p: float = 0.0, is_causal: bool = False, *_: Any, **__: Any
) -> int:
    return _sdpa(q, k, v, is_causal)


@formula(aten._scaled_dot_product_flash_attention_backward)
def _flash_cuda_backward(
    grad: Any, q: Any, k: Any, v: Any, out_: Any, lse: Any, cum_q: Any, cum_k: Any, max_q: Any, max_k: Any,
    dropout_p: float, is_causal: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _sdpa(q, k, v, is_causal) * 5 // 2


@formula(aten._scaled_dot_product_efficient_attention_backward)
def _efficient_cuda_backward(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, out_: Any, lse: Any, seed: Any, offset: Any, dropout_p: float,
    wanted: Any, is_causal: bool = False, **_: Any,
) -> int:  # fmt: skip
    return _sdpa(q, k, v, is_causal) * 5 // 2


@formula(aten._scaled_dot_product_cudnn_attention_backward)
def _cudnn_backward(
    grad: Any, q: Any, k: Any, v: Any, out_: Any, lse: Any, seed: Any, offset: Any, bias: Any, cum_q: Any, cum_k: Any,
    max_q: Any, max_k: Any, dropout_p: float, is_causal: bool, **_: Any,
) -> int:  # fmt: skip
    return _sdpa(q, k, v, is_causal) * 5 // 2


@formula(aten._native_multi_head_attention)
def _mha_fast_path(q: Any, k: Any, v: Any, embed_dim: int, num_head: int, *_: Any, **__: Any) -> int:
    batch, queries, _width = q.shape
    keys = k.shape[1]
    return int(2 * batch * embed_dim * (embed_dim * (2 * queries + 2 * keys) + 2 * queries * keys))


@formula(aten._transformer_encoder_layer_fwd)
def _encoder_fast_path(src: Any, embed_dim: int, num_heads: int, *args: Any, **_: Any) -> int:
    batch, tokens, _width = src.shape
    # The first matrix among the weights that is neither the packed Q, K, V projection nor the output projection.
    matrices = [a.shape for a in args if isinstance(a, torch.Tensor) and a.dim() == 2]
    hidden = next(shape[0] for shape in matrices if shape not in ((3 * embed_dim, embed_dim), (embed_dim, embed_dim)))
    return int(2 * batch * tokens * embed_dim * (4 * embed_dim + 2 * tokens + 2 * hidden))


@formula(aten.mv)
def _mv(matrix: Any, vector: Any, **_: Any) -> int:
    return int(2 * matrix.numel())


@formula(aten.addmv)
def _addmv(bias: Any, matrix: Any, vector: Any, **_: Any) -> int:
    return int(2 * matrix.numel())


@formula(aten.dot, aten.vdot)
def _dot(a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel())


@formula(aten.baddbmm_)
def _baddbmm_in_place(bias: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel() * b.shape[2])


@formula(aten.addmm_)
def _addmm_in_place(bias: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel() * b.shape[1])


@formula(aten._embedding_bag, aten._embedding_bag_forward_only)
def _embedding_bag(table: Any, indices: Any, *args: Any, per_sample_weights: Any = None, **_: Any) -> int:
    weights = args[4] if len(args) > 4 else per_sample_weights
    return 0 if weights is None else int(2 * indices.numel() * table.shape[1])


@formula(aten.addbmm)
def _addbmm(bias: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel() * b.shape[2])


@formula(flex_attention)
def _flex(q: Any, k: Any, v: Any, score_mod: Any, block_mask: Any, *_: Any, **__: Any) -> int:
    return 2 * _tile_pairs(q, k, block_mask) * (q.shape[3] + v.shape[3])


@formula(flex_attention_backward)
def _flex_backward(
    q: Any, k: Any, v: Any, out_: Any, lse: Any, grad: Any, grad_lse: Any, graph: Any, joint: Any, block_mask: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _tile_pairs(q, k, block_mask) * (q.shape[3] + v.shape[3]) * 5


def _tile_pairs(q: Any, k: Any, block_mask: Any) -> int:
    """Pairs of the tiles that a block mask keeps, over the whole batch and all heads.

    A mask that was itself made of fake tensors has no values: it is charged for as many tiles a row as its tables can
    hold. Make block masks outside the tracer (``torch._subclasses.fake_tensor.unset_fake_temporarily``) to count
    exactly.
    """
    batch, heads, queries, _width = q.shape
    keys = k.shape[2]
    _q_len, _kv_len, partial_counts, partial, full_counts, full = block_mask[:6]
    tile_q, tile_k = block_mask[-3], block_mask[-2]
    tables = [(partial_counts, partial)] + ([(full_counts, full)] if full is not None else [])
    if any(isinstance(tensor, FakeTensor) for table in tables for tensor in table):
        return int(batch * heads * queries * min(keys, sum(indices.shape[-1] for _, indices in tables) * tile_k))
    pairs = 0
    with unset_fake_temporarily():
        for counts, indices in tables:
            kept = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
            columns = ((keys - indices * tile_k).clamp(0, tile_k) * kept).sum(dim=-1, dtype=torch.int64)
            starts = torch.arange(counts.shape[-1], device=counts.device) * tile_q
            rows = (queries - starts).clamp(0, tile_q)
            pairs += int((columns * rows).sum()) * (batch * heads) // (counts.shape[0] * counts.shape[1])
    return pairs


@formula(aten._cdist_forward, aten._euclidean_dist)
def _cdist(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a.numel() * b.shape[-2])


@formula(aten._int_mm)
def _int_mm(a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel() * b.shape[1])


@formula(aten._trilinear)
def _trilinear(a: Any, b: Any, c: Any, *_: Any, out: Any, **__: Any) -> int:
    """``nn.functional.bilinear``: every element of the weight meets every row, then the second vector."""
    rows = a.numel() // a.shape[-1]
    return int(2 * rows * b.numel() + 2 * rows * b.shape[-3] * b.shape[-1])


@formula(aten.mkldnn_rnn_layer)
def _lstm(x: Any, weight_x: Any, weight_h: Any, *_: Any, **__: Any) -> int:
    return int(2 * x.shape[0] * x.shape[1] * (weight_x.numel() + weight_h.numel()))


def _fft(points: int, transforms: int, factor: float) -> int:
    return round(factor * transforms * points * math.log2(points)) if points > 1 else 0


@formula(aten._fft_c2c)
def _fft_c2c(x: Any, dim: Any, *_: Any, **__: Any) -> int:
    points = math.prod(x.shape[axis] for axis in dim)
    return _fft(points, x.numel() // points, 5)


@formula(aten._fft_r2c)
def _fft_r2c(x: Any, dim: Any, *_: Any, **__: Any) -> int:
    points = math.prod(x.shape[axis] for axis in dim)
    return _fft(points, x.numel() // points, 2.5)


@formula(aten._fft_c2r)
def _fft_c2r(x: Any, dim: Any, *_: Any, out: Any, **__: Any) -> int:
    points = math.prod(out.shape[axis] for axis in dim)
    return _fft(points, out.numel() // points, 2.5)
