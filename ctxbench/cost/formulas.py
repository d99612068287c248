"""FLOP formulas for operators that torch's counter is blind to. Needs torch; registering is idempotent.

Convention: ``is_causal`` attention is charged for the pairs its alignment makes visible (the fused kernels skip the
tiles beyond the diagonal); attention with a mask tensor is charged for the whole rectangle, which is what runs.
"""

from __future__ import annotations

from typing import Any

import torch
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


@formula(aten.addbmm)
def _addbmm(bias: Any, a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel() * b.shape[2])


@formula(aten._cdist_forward)
def _cdist(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * a.numel() * b.shape[-2])


@formula(aten._int_mm)
def _int_mm(a: Any, b: Any, **_: Any) -> int:
    return int(2 * a.numel() * b.shape[1])
