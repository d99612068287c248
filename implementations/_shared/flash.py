"""Fused attention over a band of keys, in Triton: no score matrix is ever written, forward or backward.

Query i of T stands at position ``i + S - T`` among the S keys (bottom-right alignment) and sees the keys from ``left``
before it to ``right`` after it: ``right = 0`` is causal, no bound on either side is full attention, ``left = w - 1``
with ``right = 0`` a sliding window of w keys. A bound becomes a range of key tiles, so what is out of sight costs
nothing; only the tiles at the edges of the band are masked.

The softmax runs online (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691) in base 2. The
backward pass computes the probabilities again from the log-sum-exp, once by rows of queries for dQ and once by rows of
keys for dK and dV: seven products instead of the five that atomic additions would need, and every run gives the same
bits. Gradients through the log-sum-exp are exact, so that results over disjoint keys can be merged.
"""

# mypy: disable-error-code="no-untyped-def"
# What a kernel is called with has types in Triton alone; the annotations that are there mean compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.flash_table import (
    BACKWARD,
    UNBOUNDED,
    WIDEST,
    Config,
    config,
    padded,
    visible_pairs,
)

LOG2_E = tl.constexpr(1.4426950408889634)


def architecture_of(device: torch.device) -> int:
    """Which half of CONFIGS a device takes: 90 where a block has the shared memory of a Hopper."""
    # Triton's interpreter runs on CPU tensors and has no limits.
    return 90 if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10) else 80


@triton.jit
def _tile_range(
    start, rows, down, up, count, BLOCK: tl.constexpr, BOUND_DOWN: tl.constexpr, BOUND_UP: tl.constexpr
):  # fmt: skip
    """Tiles of the other side that ``rows`` positions from ``start`` meet, each from ``down`` below to ``up`` above it.

    Returns ``first <= inner <= outer <= last``, or ``last < first`` for none: the tiles ``first .. last`` meet the
    band, and ``inner .. outer`` lie wholly inside it and inside the ``count`` existing positions.
    """
    first, inner = 0, 0
    last, outer = tl.cdiv(count, BLOCK), count // BLOCK
    if BOUND_DOWN:
        first = tl.maximum(start - down, 0) // BLOCK
        inner = tl.cdiv(tl.maximum(start + rows - 1 - down, 0), BLOCK)
    if BOUND_UP:
        last = tl.cdiv(tl.minimum(tl.maximum(start + rows + up, 0), count), BLOCK)
        outer = tl.minimum(outer, tl.maximum(start + up + 1, 0) // BLOCK)
    inner = tl.minimum(tl.maximum(inner, first), last)
    outer = tl.minimum(tl.maximum(outer, inner), last)
    return first, inner, outer, last


@triton.jit
def _seen(
    position, key, left, right, BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr, inside
):  # fmt: skip
    """Whether a query at ``position`` sees ``key``; ``inside``: what limits of the tensors already allow."""
    if BOUND_LEFT:
        inside = inside & (key >= position - left)
    if BOUND_RIGHT:
        inside = inside & (key <= position + right)
    return inside


@triton.jit
def _load(base, start, stride, count, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``start .. start + ROWS`` of a ``[count, D]`` matrix as ``[ROWS, WIDTH]``, zero beyond either edge."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    base += tl.cast(start, tl.int64) * stride
    mask = row[:, None] < count - start
    if D < WIDTH:
        mask = mask & (column[None, :] < D)
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, start, stride, count, value, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write what ``_load`` would read."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    base += tl.cast(start, tl.int64) * stride
    mask = row[:, None] < count - start
    if D < WIDTH:
        mask = mask & (column[None, :] < D)
    tl.store(base + row[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b):
    """``a @ b`` in float32; float32 operands as three products of TF32, whose error is float32's own."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    heads, T, S, left, right, scale, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BOUND_LEFT: tl.constexpr, BOUND_RIGHT: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries. Grid: tiles of queries, batch x heads."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # causal: the rows with most keys begin first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    OUT += batch * o_batch + head * o_head
    LSE += tl.program_id(1).to(tl.int64) * T

    row = start + tl.arange(0, ROWS)
    position = row + (S - T)
    q = _load(Q, start, q_row, T, ROWS, D, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # running maximum and sum, in units of base 2
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    to_base_2 = scale * LOG2_E
    first, inner, outer, last = _tile_range(start + S - T, ROWS, left, right, S, COLUMNS, BOUND_LEFT, BOUND_RIGHT)
    for part in tl.static_range(2):  # inside the band, then its edges, which alone need a mask
        steps = outer - inner
        if part == 1:
            steps = (inner - first) + (last - outer)
        for step in range(0, steps):
            tile = inner + step
            if part == 1:  # both edges, without what lies between them
                tile = first + step + tl.where(step < inner - first, 0, outer - inner)
            k = _load(K, tile * COLUMNS, k_row, S, COLUMNS, D, WIDTH)
            scores = _dot(q, tl.trans(k))
            if part == 1:
                key = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                seen = _seen(position[:, None], key, left, right, BOUND_LEFT, BOUND_RIGHT, key < S)
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * to_base_2)
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: keep inf - inf out
            p = tl.exp2(scores * to_base_2 - shift[:, None])
            shrink = tl.exp2(top - shift)
            total = total * shrink + tl.sum(p, 1)
            v = _load(V, tile * COLUMNS, v_row, S, COLUMNS, D, WIDTH)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = higher
    empty = total == 0.0  # queries that see no key: output 0, log-sum-exp -inf
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    _store(OUT, start, o_row, T, acc, ROWS, D, WIDTH)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)
    tl.store(LSE + row, lse, mask=row < T)


@triton.jit
def dq_kernel(
    Q, K, V, OUT, GRAD, LSE, GRAD_LSE, DELTA, DQ,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_batch, o_head, o_row, g_batch, g_head, g_row, dq_batch, dq_head, dq_row, heads, T, S, left, right, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr, THROUGH_LSE: tl.constexpr,
):  # fmt: skip
    """Gradient dQ of one tile of queries, and for ``dkv_kernel`` the row sums of ``grad * output``. Grid as forward."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    OUT += batch * o_batch + head * o_head
    GRAD += batch * g_batch + head * g_head
    DQ += batch * dq_batch + head * dq_head
    of_rows = tl.program_id(1).to(tl.int64) * T

    row = start + tl.arange(0, ROWS)
    position = row + (S - T)
    q = _load(Q, start, q_row, T, ROWS, D, WIDTH)
    grad = _load(GRAD, start, g_row, T, ROWS, D, WIDTH)
    o = _load(OUT, start, o_row, T, ROWS, D, WIDTH)
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)
    if THROUGH_LSE:
        delta -= tl.load(GRAD_LSE + of_rows + row, mask=row < T, other=0.0)
    tl.store(DELTA + of_rows + row, delta, mask=row < T)
    lse = tl.load(LSE + of_rows + row, mask=row < T, other=0.0) * LOG2_E
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    first, inner, outer, last = _tile_range(start + S - T, ROWS, left, right, S, COLUMNS, BOUND_LEFT, BOUND_RIGHT)
    for part in tl.static_range(2):
        steps = outer - inner
        if part == 1:
            steps = (inner - first) + (last - outer)
        for step in range(0, steps):
            tile = inner + step
            if part == 1:  # both edges, without what lies between them
                tile = first + step + tl.where(step < inner - first, 0, outer - inner)
            k = _load(K, tile * COLUMNS, k_row, S, COLUMNS, D, WIDTH)
            v = _load(V, tile * COLUMNS, v_row, S, COLUMNS, D, WIDTH)
            scores = _dot(q, tl.trans(k))
            if part == 1:
                key = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                seen = _seen(position[:, None], key, left, right, BOUND_LEFT, BOUND_RIGHT, key < S)
                scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
            ds = p * (_dot(grad, tl.trans(v)) - delta[:, None])
            acc += _dot(ds.to(k.dtype), k)
    _store(DQ, start, dq_row, T, acc * scale, ROWS, D, WIDTH)


@triton.jit
def dkv_kernel(
    Q, K, V, GRAD, LSE, DELTA, DK, DV, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch,
    g_head, g_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, T, S, left, right, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
):  # fmt: skip
    """Gradients dK and dV of one tile of keys; scores are ``[COLUMNS, ROWS]``. Grid: tiles of keys, batch x heads."""
    start = tl.program_id(0) * COLUMNS  # causal: the keys that most queries see begin first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + head * k_head
    V += batch * v_batch + head * v_head
    GRAD += batch * g_batch + head * g_head
    DK += batch * dk_batch + head * dk_head
    DV += batch * dv_batch + head * dv_head
    LSE += tl.program_id(1).to(tl.int64) * T
    DELTA += tl.program_id(1).to(tl.int64) * T

    key = start + tl.arange(0, COLUMNS)
    k = _load(K, start, k_row, S, COLUMNS, D, WIDTH)
    v = _load(V, start, v_row, S, COLUMNS, D, WIDTH)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH], tl.float32)
    # A key is seen from `right` before it to `left` after it.
    first, inner, outer, last = _tile_range(start - (S - T), COLUMNS, right, left, T, ROWS, BOUND_RIGHT, BOUND_LEFT)
    for part in tl.static_range(2):
        steps = outer - inner
        if part == 1:
            steps = (inner - first) + (last - outer)
        for step in range(0, steps):
            tile = inner + step
            if part == 1:  # both edges, without what lies between them
                tile = first + step + tl.where(step < inner - first, 0, outer - inner)
            row = tile * ROWS + tl.arange(0, ROWS)
            q = _load(Q, tile * ROWS, q_row, T, ROWS, D, WIDTH)
            grad = _load(GRAD, tile * ROWS, g_row, T, ROWS, D, WIDTH)
            lse = tl.load(LSE + row, mask=row < T, other=0.0) * LOG2_E
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            delta = tl.load(DELTA + row, mask=row < T, other=0.0)
            scores = _dot(k, tl.trans(q))
            if part == 1:
                position = row[None, :] + (S - T)
                seen = _seen(position, key[:, None], left, right, BOUND_LEFT, BOUND_RIGHT, row[None, :] < T)
                scores = tl.where(seen, scores, float("-inf"))
            p = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
            dv += _dot(p.to(grad.dtype), grad)
            ds = p * (_dot(v, tl.trans(grad)) - delta[None, :])
            dk += _dot(ds.to(q.dtype), q)
    _store(DK, start, dk_row, S, dk * scale, COLUMNS, D, WIDTH)
    _store(DV, start, dv_row, S, dv, COLUMNS, D, WIDTH)


def _options(kernel: str, q: torch.Tensor, left: int, right: int) -> tuple[Config, dict[str, Any]]:
    """Launch parameters of one kernel, and its compile-time arguments."""
    width = q.shape[3]
    chosen = config(kernel, width, q.element_size(), architecture_of(q.device))
    return chosen, {
        "D": width, "WIDTH": padded(width), "ROWS": chosen.rows, "COLUMNS": chosen.columns,
        "BOUND_LEFT": left != UNBOUNDED, "BOUND_RIGHT": right != UNBOUNDED,
        "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The same tensor with the channels of a row side by side, as the kernels read them."""
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("ctxbench::flash", mutates_args=())
def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, H, T, D = q.shape
    out, lse = _like(q), q.new_empty(B, H, T, dtype=torch.float32)
    chosen, options = _options("forward", q, left, right)
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
        forward_kernel[triton.cdiv(T, chosen.rows), B * H](
            q, k, v, out, lse, *_strides(q, k, v, out), H, T, k.shape[2], left, right, D**-0.5, **options
        )
    return out, lse


@torch.library.custom_op("ctxbench::flash_backward", mutates_args=())
def _flash_backward(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, left: int, right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    B, H, T, D = q.shape
    S = k.shape[2]
    dq, dk, dv, delta = _like(q), _like(k), _like(v), torch.empty_like(lse)
    through = lse if grad_lse is None else grad_lse.contiguous()
    shared = H, T, S, left, right, D**-0.5
    with torch.cuda.device_of(q):
        chosen, options = _options("dq", q, left, right)
        dq_kernel[triton.cdiv(T, chosen.rows), B * H](
            q, k, v, out, grad, lse, through, delta, dq, *_strides(q, k, v, out, grad, dq), *shared,
            THROUGH_LSE=grad_lse is not None, **options,
        )  # fmt: skip
        chosen, options = _options("dkv", q, left, right)
        dkv_kernel[triton.cdiv(S, chosen.columns), B * H](
            q, k, v, grad, lse, delta, dk, dv, *_strides(q, k, v, grad, dk, dv), *shared, **options
        )
    return dq, dk, dv


def _like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of that shape with channels side by side; heads stay where they are, so merging them is free."""
    like = torch.empty_like(x)
    return like if like.stride(3) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


@_flash.register_fake
def _flash_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int, right: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_flash_backward.register_fake
def _flash_backward_fake(
    grad: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, left: int, right: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _like(q), _like(k), _like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.left, ctx.right = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # most callers drop the log-sum-exp


def _differentiate(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    return *_flash_backward(grad, grad_lse, q, k, v, out, lse, ctx.left, ctx.right), None, None


_flash.register_autograd(_differentiate, setup_context=_save)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int | None = None, right: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention with scale ``D ** -0.5`` over the keys from ``left`` before a query to ``right`` after it.

    Args:
        q: ``[B, H, T, D]``, any strides; float32, float16 or bfloat16.
        k: ``[B, H, S, D]``; its last key stands where the last query does.
        v: the same shape as ``k``.
        left: how many earlier keys a query sees; None for all.
        right: how many later keys a query sees; 0 is causal, None for all.

    Returns:
        Output ``[B, H, T, D]``, and the natural log-sum-exp of the scaled scores ``[B, H, T]`` in float32. A query that
        sees no key has output 0 and log-sum-exp minus infinity.

    Raises:
        ValueError: for shapes, dtypes or radii the kernels do not take.
    """
    if v.shape != k.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in batch, heads and width, received {q.shape}, {k.shape}, {v.shape}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be all fp32, fp16 or bf16, received {q.dtype}, {k.dtype}, {v.dtype}")
    widest = WIDEST[q.element_size()]
    if q.shape[3] > widest:
        raise ValueError(f"in {q.dtype} a head has at most {widest} channels, received {q.shape[3]}")
    for name, radius in (("left", left), ("right", right)):
        if radius is not None and radius < 0:
            raise ValueError(f"{name} must be at least 0, received {radius}")
    return _flash(q, k, v, UNBOUNDED if left is None else left, UNBOUNDED if right is None else right)


@formula(torch.ops.ctxbench.flash)
def _flash_flops(q: Any, k: Any, v: Any, left: int, right: int, **_: Any) -> int:
    """Two products over the visible pairs; tiles beyond the band are skipped."""
    return int(4 * q.shape[0] * q.shape[1] * q.shape[3] * visible_pairs(q.shape[2], k.shape[2], left, right))


@formula(torch.ops.ctxbench.flash_backward)
def _flash_backward_flops(
    grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, out_: Any, lse: Any, left: int, right: int, **_: Any
) -> int:
    """Seven products: scores and their gradient in both kernels, then dQ, dK and dV."""
    return int(_flash_flops(q, k, v, left, right) * BACKWARD)
