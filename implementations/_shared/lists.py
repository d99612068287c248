"""Fused attention of blocks of queries over lists of key blocks, per head: the operator around ``flash_lists``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import flash_lists as kernels
from ctxbench.implementations._shared.flash_table import BACKWARD, chunk, listed_config, padded
from ctxbench.implementations._shared.lines import PLAIN, SLOPES, TABLE
from ctxbench.implementations._shared.ranges import _farthest, _like, _rows, _strides, architecture_of


class Lists(NamedTuple):
    """Rows in compressed form: row r of head h sees the blocks ``listed[offsets[h, r] : offsets[h, r + 1]]``.

    Attributes:
        size: tokens of a block of queries and of a block of keys.
        offsets: ``[H, rows + 1]`` int32.
        listed: ``[entries]`` int32, the blocks of keys.
        pairs: (query, key) pairs of all heads, where the last block of keys may be shorter.
    """

    size: int
    offsets: torch.Tensor
    listed: torch.Tensor
    pairs: int


def from_tables(size: int, keys: int, tables: list[torch.Tensor], last_listed: int) -> Lists:
    """Lists of rows that follow each other, ``[H, n, columns]`` a table; the last block is in ``last_listed`` of all.

    Nothing but sums and copies on the device of the tables.
    """
    heads = tables[0].shape[0]
    lengths = torch.cat([x.new_full(x.shape[1:2], x.shape[2]) for x in tables])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    per_head = sum(x[0].numel() for x in tables)
    offsets = ends + per_head * torch.arange(heads, device=ends.device)[:, None]
    listed = torch.cat([x.flatten(1) for x in tables], dim=1).flatten()
    blocks = -(-keys // size)
    short = blocks * size - keys
    pairs = size * (size * heads * per_head - short * last_listed)
    return Lists(size, offsets.int(), listed.int(), pairs)


def turned(offsets: torch.Tensor, listed: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same lists by blocks of keys: which rows see each, ascending. ``offsets: [H, blocks + 1]``."""
    heads, rows = offsets.shape[0], offsets.shape[1] - 1
    lengths = offsets.diff(dim=1).flatten()
    row = torch.repeat_interleave(torch.arange(heads * rows, device=listed.device), lengths, output_size=listed.numel())
    place = row // rows * blocks + listed  # head and block of keys
    order = place.sort(stable=True).indices
    bounds = torch.arange(heads * blocks + 1, device=listed.device)
    ends = torch.searchsorted(place[order], bounds)
    by_head = torch.stack([ends[head * blocks : (head + 1) * blocks + 1] for head in range(heads)])
    return by_head.int(), (row % rows)[order].int()


def attend_listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: Lists, *, offset: int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention with scale ``D ** -0.5`` of each block of queries over the blocks of keys that are listed.

    Args:
        q: ``[B, H, T, D]``, row r of the lists its tokens ``r * size ..``.
        k: ``[B, H, S, D]``, as ``v``.
        v: values.
        lists: who sees whom.
        offset: position of the first query among the keys, for ``bias``.
        bias: added to the scaled scores in float32, by distance, as in ``ranges.attend``: slopes ``[H]``, constants, or
            a table ``[H, 2 F + 1]``, which gets a gradient.

    Returns:
        ``[B, H, T, D]``.
    """
    if bias is not None:
        bias = (bias.detach() if bias.dim() == 1 else bias).float().contiguous()
    return _listed(q, k, v, bias, lists.offsets, lists.listed, lists.size, offset, lists.pairs)[0]


def _options(kernel: str, q: torch.Tensor, size: int, kind: int) -> tuple[Any, dict[str, Any]]:
    chosen = listed_config(kernel, q.shape[3], q.element_size(), architecture_of(q.device), size, kind == TABLE)
    return chosen, {
        "D": q.shape[3], "WIDTH": padded(q.shape[3]), "CHUNK": chunk(q.shape[3], q.element_size()), "ROWS": chosen.rows,
        "COLUMNS": chosen.columns, "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip


def _kind(bias: torch.Tensor | None) -> int:
    return PLAIN if bias is None else SLOPES if bias.dim() == 1 else TABLE


@torch.library.custom_op("ctxbench::listed", mutates_args=())
def _listed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor,
    listed: torch.Tensor, size: int, offset: int, pairs: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, H, T, D = q.shape
    out, lse = _like(q), q.new_empty(B, H, T, dtype=torch.float32)
    chosen, options = _options("forward", q, size, _kind(bias))
    tiles = triton.cdiv(T, size) * triton.cdiv(size, chosen.rows)
    with torch.cuda.device_of(q):
        kernels.listed_forward_kernel[tiles, B * H](
            q, k, v, out, lse, lse if bias is None else bias, offsets, listed, *_strides(q, k, v, out), H, T,
            k.shape[2], size, -offset, _farthest(bias), D**-0.5, BIAS=_kind(bias), **options,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("ctxbench::listed_backward", mutates_args=())
def _listed_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
    offsets: torch.Tensor, listed: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, size: int, offset: int,
    pairs: int, of_table: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """DQ, dK and dV, and that of a table of biases where it is asked for."""
    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    B, H, T, D = q.shape
    S = k.shape[2]
    dq, dk, dv, delta = _like(q), _like(k), _like(v), torch.empty_like(lse)
    gradients = [dq, dk, dv]
    biases, kind = lse if bias is None else bias, _kind(bias)
    shared = H, T, S, size, -offset, _farthest(bias), D**-0.5
    with torch.cuda.device_of(q):
        chosen, options = _options("dq", q, size, kind)
        tiles = triton.cdiv(T, size) * triton.cdiv(size, chosen.rows)
        kernels.listed_dq_kernel[tiles, B * H](
            q, k, v, out, grad, lse, delta, biases, dq, offsets, listed, *_strides(q, k, v, out, grad, dq), *shared,
            BIAS=kind, **options,
        )  # fmt: skip
        if bias is not None and of_table:
            chosen, options = _options("table", q, size, kind)
            tiles = triton.cdiv(T, size) * triton.cdiv(size, chosen.rows)
            sums = lse.new_zeros(tiles, B, *bias.shape)
            kernels.listed_table_kernel[tiles, B * H](
                q, k, v, grad, lse, delta, bias, sums, offsets, listed, *_strides(q, k, v, grad), *shared, **options,
            )  # fmt: skip
            gradients.append(sums.sum((0, 1)))
        chosen, options = _options("dkv", q, size, kind)
        offsets, listed = turned(offsets, listed, triton.cdiv(S, size))
        tiles = triton.cdiv(S, size) * triton.cdiv(size, chosen.columns)
        kernels.listed_dkv_kernel[tiles, B * H](
            q, k, v, grad, lse, delta, biases, dk, dv, offsets, listed, *_strides(q, k, v, grad, dk, dv), *shared,
            BIAS=kind, **options,
        )  # fmt: skip
    return gradients


@_listed.register_fake
def _listed_fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_listed_backward.register_fake
def _listed_backward_fake(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> list[torch.Tensor]:
    return [_like(q), _like(k), _like(v), *([torch.empty_like(bias)] if bias is not None and rest[-1] else [])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.size, ctx.offset, ctx.pairs = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: torch.Tensor, _grad_lse: Any) -> tuple[Any, ...]:
    of_table = ctx.needs_input_grad[3]
    gradients = _listed_backward(grad, *ctx.saved_tensors, ctx.size, ctx.offset, ctx.pairs, of_table)
    return *gradients, *[None] * (9 - len(gradients))


_listed.register_autograd(_differentiate, setup_context=_save)


@formula(torch.ops.ctxbench.listed)
def _listed_flops(
    q: Any, k: Any, v: Any, bias: Any, offsets: Any, listed: Any, size: int, offset: int, pairs: int, **_: Any
) -> int:
    """Two products over the pairs that are listed."""
    return int(4 * q.shape[0] * q.shape[3] * pairs)


@formula(torch.ops.ctxbench.listed_backward)
def _listed_backward_flops(grad: Any, q: Any, *rest: Any, **_: Any) -> int:
    """Seven products, as of ``ranges``, and two more for a table of biases."""
    pairs, of_table = rest[-2:]
    return int(4 * q.shape[0] * q.shape[3] * pairs * (BACKWARD + int(of_table)))
