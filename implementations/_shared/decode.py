"""Attention of one or a few queries to a long cache, in Triton: the keys are split over the device.

A block of the flash kernels holds a tile of queries and walks along all keys: for one query that is one busy
multiprocessor a head. Here every block takes a part of the keys; a second, small kernel merges the parts by their
log-sum-exp (Dao et al. 2023, Flash-Decoding). Queries that share a head of keys (grouped queries, Ainslie et al. 2023)
are rows of one tile, so that keys are read once for all of them.

The cache is a tensor whose rows are keys in their order, or a ring: its first ``sinks`` rows stay where they are, the
others are overwritten in turn and the oldest of them lies at ``start``. Nothing is moved or copied. Forward only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import ranges
from ctxbench.implementations._shared.decode_table import FEW, WIDEST, chunk, config, visible_pairs
from ctxbench.implementations._shared.flash_table import chunk as chunk_of_channels
from ctxbench.implementations._shared.flash_table import padded

if TYPE_CHECKING:
    from ctxbench.implementations._shared.turning import Unturned


@torch.library.custom_op("ctxbench::decode", mutates_args=())
def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int, start: int, sinks: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from ctxbench.implementations._shared import decode_kernels as kernels  # Triton is a package of its own

    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    B, H, T, D = q.shape
    heads, capacity = k.shape[1], k.shape[2]
    group, chosen = H // heads, config(D, q.element_size())
    of_queries = -(-group * T // chosen.rows)
    part = chunk(B * heads * of_queries, keys, chosen.columns)
    parts = -(-keys // part)
    out, lse = _decode_fake(q, k, v, keys, start, sinks, causal, scale)
    partial, partial_lse = out[None], lse  # of one part there is nothing to merge
    if parts > 1:
        partial, partial_lse = (lse.new_empty(parts, B, H, T, *last) for last in ((D,), ()))
    shared = {"D": D, "WIDTH": padded(D)}
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever the tensors'
        kernels.partial_kernel[parts, B * heads, of_queries](
            q, k, v, partial, partial_lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *partial.stride()[:4],
            heads, T, capacity, keys, start, sinks, part, scale, GROUP=group, ROWS=chosen.rows,
            COLUMNS=chosen.columns, CHUNK=chunk_of_channels(D, q.element_size()), CAUSAL=causal and T > 1,
            RING=start > 0, num_warps=chosen.warps, num_stages=chosen.stages, **shared,
        )  # fmt: skip
        if parts > 1:
            kernels.merge_kernel[B * H * T,](
                partial,
                partial_lse,
                out,
                lse,
                *out.stride()[:3],
                H,
                T,
                parts,
                PARTS=kernels.PARTS,
                num_warps=1,
                **shared,
            )
    return out, lse


@_decode.register_fake
def _decode_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: int, start: int, sinks: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q)  # heads stay where they are, so merging them is free
    if out.stride(3) != 1:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def decode(
    q: torch.Tensor | Unturned, k: torch.Tensor, v: torch.Tensor, keys: int | None = None, *, start: int = 0,
    sinks: int = 0, causal: bool = True, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax attention of few queries, the last of which stands at the last key. Gives no gradients.

    Args:
        q: ``[B, H, T, D]``, any strides; float32, float16 or bfloat16.
        k: ``[B, G, S, D]``; H is a multiple of G, and G heads of keys serve H / G heads of queries each.
        v: the same shape as ``k``.
        keys: how many rows of the cache are filled; None for all.
        start: in a full ring, how many rows after the sinks its oldest key lies.
        sinks: rows at the front of the cache that stay.
        causal: an earlier query sees no key after its own.
        scale: of the scores; None for ``D ** -0.5``.

    Returns:
        Output ``[B, H, T, D]``, and the natural log-sum-exp of the scaled scores ``[B, H, T]`` in float32. A query that
        sees no key has output 0 and log-sum-exp minus infinity.

    Raises:
        ValueError: for shapes, dtypes or places the kernels do not take.
    """
    q = q if isinstance(q, torch.Tensor) else q.turned()
    if v.shape != k.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must agree in batch and width, and the heads of q be a multiple of those of k and v, received "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must be all fp32, fp16 or bf16, received {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[3] > WIDEST[q.element_size()]:
        raise ValueError(f"in {q.dtype} a head has at most {WIDEST[q.element_size()]} channels, received {q.shape[3]}")
    capacity = k.shape[2]
    keys = capacity if keys is None else keys
    if not 1 <= keys <= capacity:
        raise ValueError(f"keys must be between 1 and the {capacity} rows of the cache, received {keys}")
    if start and keys < capacity:
        raise ValueError(f"only a full ring has its oldest key elsewhere, received start={start} and keys={keys}")
    if not 0 <= sinks < capacity or not 0 <= start < capacity - sinks:
        raise ValueError(f"sinks and start must lie in a cache of {capacity} rows, received {sinks} and {start}")
    return _decode(q, k, v, keys, start, sinks, causal, q.shape[3] ** -0.5 if scale is None else scale)


def is_decoding(q: torch.Tensor | Unturned, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a call has few queries beside its keys, nobody asks for gradients, and there are kernels for it."""
    few = not ranges.native(q) and q.shape[2] <= FEW and k.shape[2] >= 2 * FEW + q.shape[2]
    return few and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


@formula(torch.ops.ctxbench.decode)
def _decode_flops(q: Any, k: Any, v: Any, keys: int, start: int, sinks: int, causal: bool, *_: Any, **__: Any) -> int:
    """Two products over the visible pairs; the products of the rows that fill a tile are not counted."""
    return int(4 * q.shape[0] * q.shape[1] * q.shape[3] * visible_pairs(q.shape[2], keys, causal))
