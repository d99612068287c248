"""Transformer-XL's relative attention as two operators, forward and backward, over the kernels of ``relative_kernels``.

``relative`` is the operator alone; ``attend`` projects keys and values too, as one node, so that memory rows pass
gradients to weights alone, as ``relative.attend`` does on a CPU.

B batch, H heads, D head width, T rows of queries, P rows of keys, F entries, N distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import relative_backward as backward
from ctxbench.implementations._shared import relative_kernels as kernels
from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.ranges import _like, _rows, _strides, architecture_of
from ctxbench.implementations._shared.relative import Geometry
from ctxbench.implementations._shared.relative_table import (
    BACKWARD,
    FORWARD,
    Stair,
    chunk,
    padded,
    row_parts,
    tile,
    visible_pairs,
)


def relative(
    q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor, stair: Stair
) -> torch.Tensor:
    """``softmax([(q + u) k + (q + w) r_distance] / sqrt(D)) v`` over what ``stair`` shows, ``[B, H, T, D]``.

    ``q: [B, H, T, D]``, ``k, v: [B, H, P, D]``, any strides, in fp32, fp16 or bf16; ``u, w: [H, D]``, added to queries
    before the products with contents and with distances; ``r: [H, N, D]`` by rising distance from ``nearest`` on.
    """
    return torch.ops.ctxbench.relative(q, u, w, k, v, r, None, None, list(stair))[0]


def attend(
    layer: Any, x: torch.Tensor, rows: torch.Tensor, geometry: Geometry, far: torch.Tensor | None = None
) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in ``relative.attend``."""
    H = layer.num_heads
    longest = max(block.keys for block in geometry.blocks(x.shape[1], heads=1))
    r = layer.r(layer.table[:longest]).unflatten(1, (H, -1)).transpose(0, 1)
    known = geometry.far if far is not None else geometry.far._replace(capacity=0)
    stair = Stair(
        geometry.segment_len, geometry.mem_len, geometry.past, geometry.phase, int(geometry.same_length),
        known=known.known, capacity=known.capacity, rate=known.rate,
    )  # fmt: skip
    mixed = Remembered.apply(
        split_heads(layer.q(x), H), layer.content_bias, layer.position_bias, rows, layer.k.weight, layer.v.weight, r,
        far, stair,
    )  # fmt: skip
    return merge_heads(mixed)


class Remembered(torch.autograd.Function):
    """Projection of keys and values, and attention; no gradient passes to a row from later segments, nor to entries."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, rows: torch.Tensor, w_k: torch.Tensor,
        w_v: torch.Tensor, r: torch.Tensor, far: torch.Tensor | None, stair: Stair,
    ) -> torch.Tensor:  # fmt: skip
        k, v, far_k, far_v = (
            None if stream is None else split_heads(linear(stream, weight), len(r))
            for stream in (rows, far)
            for weight in (w_k, w_v)
        )
        out, lse = torch.ops.ctxbench.relative(q, u, w, k, v, r, far_k, far_v, list(stair))
        ctx.stair = stair
        ctx.save_for_backward(q, u, w, k, v, r, far_k, far_v, out, lse, rows, far, w_k, w_v)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, rows, far, w_k, w_v = ctx.saved_tensors
        dq, du, dw, dr, *streams = torch.ops.ctxbench.relative_backward(grad, *saved, list(ctx.stair), True)
        k, v, own_k, own_v, far_k, far_v = (merge_heads(stream) if stream.dim() == 4 else None for stream in streams)
        by_rows = (own_k @ w_k).add_(own_v @ w_v)
        by_w_k = k.flatten(0, 1).T @ rows.flatten(0, 1)
        by_w_v = v.flatten(0, 1).T @ rows.flatten(0, 1)
        if far is not None:
            by_w_k.addmm_(far_k.flatten(0, 1).T, far.flatten(0, 1))
            by_w_v.addmm_(far_v.flatten(0, 1).T, far.flatten(0, 1))
        return dq, du, dw, by_rows, by_w_k, by_w_v, dr, None, None


def _options(kernel: str, q: torch.Tensor, stair: Stair, far: bool) -> tuple[int, dict[str, Any]]:
    """Side of a tile, and compile-time arguments of one kernel."""
    width = q.shape[3]
    chosen = tile(kernel, width, q.element_size(), architecture_of(q.device), far)
    return chosen.side, {
        "D": width, "WIDTH": padded(width), "CHUNK": chunk(width, q.element_size()), "SIDE": chosen.side,
        "BAND": bool(stair.band), "CAUSAL": bool(stair.causal), "FAR": far, "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }  # fmt: skip


def _entries(
    k: torch.Tensor, v: torch.Tensor, far_k: torch.Tensor | None, far_v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Entries, or other tensors in their place, and whether there are any."""
    if far_k is None or far_v is None or not far_k.shape[2]:
        return k, v, False
    return _rows(far_k), _rows(far_v), True


def _sizes(
    q: torch.Tensor, k: torch.Tensor, r: torch.Tensor, far_k: torch.Tensor, stair: Stair
) -> tuple[list[int], list[int]]:
    """What all kernels take between strides and scale: of the rows, and of the entries.

    A memory of more rows than there are shows all of them, and so do more entries; an entry a rate beyond the rows
    never comes. So 32 bits hold what kernels make of these numbers, however large a parameter is.
    """
    P, F = k.shape[2], far_k.shape[2]
    rows = [q.shape[1], q.shape[2], P, r.shape[1], stair.nearest, stair.past, stair.phase, stair.segment]
    return [*rows, min(stair.memory, P)], [F, stair.known, min(stair.capacity, F), min(stair.rate, P + 1)]


@torch.library.custom_op("ctxbench::relative", mutates_args=())
def _relative(
    q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor,
    far_k: torch.Tensor | None, far_v: torch.Tensor | None, stair: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, r, bounds = _rows(q), _rows(k), _rows(v), _rows(r[None])[0], Stair(*stair)
    B, H, T, D = q.shape
    out, lse = _like(q), q.new_empty(B, H, T, dtype=torch.float32)
    entry_k, entry_v, far = _entries(k, v, far_k, far_v)
    near, entries = _sizes(q, k, r, entry_k, bounds)
    side, options = _options("forward", q, bounds, far)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
        kernels.relative_forward_kernel[triton.cdiv(T, side), B * H](
            q, u.contiguous(), w.contiguous(), k, v, r, entry_k, entry_v, out, lse,
            *_strides(q, k, v, entry_k, entry_v, out), *r.stride()[:2], *near, *entries, D**-0.5, **options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("ctxbench::relative_backward", mutates_args=())
def _relative_backward(
    grad: torch.Tensor, q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    r: torch.Tensor, far_k: torch.Tensor | None, far_v: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    stair: Sequence[int], split: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of q, u, w, r, k, v; of k and v from their own segments alone, where ``split``; of the entries."""
    q, k, v, r, grad, bounds = _rows(q), _rows(k), _rows(v), _rows(r[None])[0], _rows(grad), Stair(*stair)
    B, H, T, D = q.shape
    entry_k, entry_v, far = _entries(k, v, far_k, far_v)
    results = _gradients(q, u, w, k, v, r, far_k, far_v, split)
    dq, _du, _dw, _dr, dk, dv, own_k, own_v, far_dk, far_dv = results
    delta, content, position = torch.empty_like(lse), q + u[:, None], q + w[:, None]
    near, entries = _sizes(q, k, r, entry_k, bounds)
    with torch.cuda.device_of(q):
        side, options = _options("dq", q, bounds, far)
        backward.relative_dq_kernel[triton.cdiv(T, side), B * H](
            q, u.contiguous(), w.contiguous(), k, v, r, entry_k, entry_v, out, grad, lse, delta, dq,
            *_strides(q, k, v, entry_k, entry_v, out, grad, dq), *r.stride()[:2], *near, *entries, D**-0.5, **options,
        )  # fmt: skip
        sums = []
        streams = [(k, v, dk, dv, own_k if split else dk, own_v if split else dv, False)]
        if far:
            streams.append((entry_k, entry_v, far_dk, far_dv, far_dk, far_dv, True))
        for keys, values, key_grad, value_grad, own_key_grad, own_value_grad, of_entries in streams:
            side, options = _options("dkv", q, bounds, of_entries)
            near[2], tiles = keys.shape[2], triton.cdiv(keys.shape[2], side)
            sums.append(q.new_empty(tiles, B, H, D, dtype=torch.float32))
            backward.relative_dkv_kernel[tiles, B * H](
                content, position, keys, values, r, grad, lse, delta, key_grad, value_grad, own_key_grad,
                own_value_grad, sums[-1],
                *_strides(content, keys, values, grad, key_grad, value_grad, own_key_grad, own_value_grad),
                *r.stride()[:2], *near, *entries[1:], D**-0.5, SPLIT=split and not of_entries, **options,
            )  # fmt: skip
        near[2] = k.shape[2]
        side, options = _options("dr", q, bounds, far)
        tiles = triton.cdiv(r.shape[1], side)
        parts = row_parts(r.shape[1], T, B * H, bounds, side)
        by_distance = r.new_empty(parts, B, H, r.shape[1], D, dtype=torch.float32)
        by_w = r.new_empty(tiles * parts, B, H, D, dtype=torch.float32)
        backward.relative_dr_kernel[tiles * parts, B * H](
            content, position, k, v, r, entry_k, entry_v, grad, lse, delta, by_distance, by_w,
            *_strides(content, k, v, entry_k, entry_v, grad), *r.stride()[:2], *near, *entries, parts, D**-0.5,
            **options,
        )  # fmt: skip
    results[1] = sum(part.sum((0, 1)) for part in sums).to(u.dtype)
    results[2] = by_w.sum((0, 1)).to(w.dtype)
    results[3] = by_distance.sum((0, 1)).to(r.dtype)
    return results


def _gradients(
    q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor,
    far_k: torch.Tensor | None, far_v: torch.Tensor | None, split: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Tensors of the shapes of the backward operator's results; what is not asked for is empty."""
    own = [_like(k), _like(v)] if split else [q.new_empty(0), q.new_empty(0)]
    entries = [q.new_empty(0), q.new_empty(0)]
    if far_k is not None and far_v is not None:
        entries = [_like(far_k), _like(far_v)]
    streams = [_like(k), _like(v), *own, *entries]
    return [_like(q), torch.empty_like(u), torch.empty_like(w), r.new_empty(r.shape), *streams]


@_relative.register_fake
def _relative_fake(
    q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor,
    far_k: torch.Tensor | None, far_v: torch.Tensor | None, stair: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_relative_backward.register_fake
def _relative_backward_fake(
    grad: torch.Tensor, q: torch.Tensor, u: torch.Tensor, w: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    r: torch.Tensor, far_k: torch.Tensor | None, far_v: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    stair: Sequence[int], split: bool,
) -> list[torch.Tensor]:  # fmt: skip
    return _gradients(q, u, w, k, v, r, far_k, far_v, split)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.stair = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # nobody differentiates the log-sum-exp


def _differentiate(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    results = torch.ops.ctxbench.relative_backward(grad, *ctx.saved_tensors, ctx.stair, False)
    dq, du, dw, dr, dk, dv, _own_k, _own_v, far_k, far_v = results
    entries = (far_k, far_v) if far_k.dim() == 4 else (None, None)
    return dq, du, dw, dk, dv, dr, *entries, None


_relative.register_autograd(_differentiate, setup_context=_save)


@formula(torch.ops.ctxbench.relative)
def _relative_flops(
    q: Any, u: Any, w: Any, k: Any, v: Any, r: Any, far_k: Any, far_v: Any, stair: Sequence[int], **_: Any
) -> int:
    """Three products over the visible pairs; tiles out of sight are skipped, those at the edges multiplied whole."""
    return 2 * FORWARD * q.shape[0] * q.shape[1] * q.shape[3] * visible_pairs(q.shape[2], k.shape[2], Stair(*stair))


@formula(torch.ops.ctxbench.relative_backward)
def _relative_backward_flops(
    grad: Any, q: Any, u: Any, w: Any, k: Any, v: Any, r: Any, far_k: Any, far_v: Any, out_: Any, lse: Any,
    stair: Sequence[int], split: bool, **_: Any,
) -> int:  # fmt: skip
    return _relative_flops(q, u, w, k, v, r, far_k, far_v, stair) * BACKWARD // FORWARD
