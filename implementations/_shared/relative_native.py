"""The forward pass of ``relative`` in C++ (``relative_native.cpp``): no joined keys, and scores stay in the caches.

Streams and geometry are those of ``relative``, whose backward pass computes the scores again and serves here too.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared import relative
from ctxbench.implementations._shared.native import function, integers
from ctxbench.implementations._shared.relative import Geometry, Operands
from ctxbench.implementations._shared.relative_table import Stair, visible_pairs
from ctxbench.implementations._shared.staircase import PANEL

SOURCE = Path(__file__).with_suffix(".cpp")


def attend(
    layer: Any, x: torch.Tensor, rows: torch.Tensor, geometry: Geometry, far: torch.Tensor | None = None
) -> torch.Tensor:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in ``relative.attend``."""
    return relative.attend(layer, x, rows, geometry, far, function=_Native)


def staircase(operands: Operands, geometry: Geometry) -> torch.Tensor:
    """``[H * B, T, D]``, of a batch of one stored as ``[T, H, D]``; no gradient."""
    content, position, k, v, r, far_k, far_v = operands
    items, tokens, width = content.shape
    heads, distances, _ = r.shape
    alone = items == heads  # then heads are merged without a copy
    out = content.new_empty(tokens, heads, width).transpose(0, 1) if alone else torch.empty_like(content)
    packed = r.new_empty(heads * -(-distances // PANEL) * PANEL * width)
    known = geometry.far if far_k is not None else geometry.far._replace(capacity=0)
    stair = Stair(
        geometry.segment_len, geometry.mem_len, geometry.past, geometry.phase, int(geometry.same_length),
        known=known.known, capacity=known.capacity, rate=known.rate,
    )  # fmt: skip
    torch.ops.ctxbench.relative_native(content, position, k, v, r, far_k, far_v, stair, packed, out)
    return out


class _Native(relative.Staircase):
    """The same function and gradients, computed in another way forward."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        return staircase(relative.project(ctx, *arguments), ctx.geometry)


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    sizes = ctypes.POINTER(ctypes.c_int64)
    types = (*[ctypes.c_void_p] * 9, sizes, sizes, ctypes.c_double, ctypes.c_int)
    return function(SOURCE, "attend", dtype, *types)


_LIBRARY = torch.library.Library("ctxbench", "FRAGMENT")
_LIBRARY.define(
    "relative_native(Tensor content, Tensor position, Tensor k, Tensor v, Tensor r, Tensor? far_k, Tensor? far_v, "
    "int[] stair, Tensor(a!) packed, Tensor(b!) out) -> ()"
)


@torch.library.impl(_LIBRARY, "relative_native", "CPU")
def _(
    content: torch.Tensor, position: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor,
    far_k: torch.Tensor | None, far_v: torch.Tensor | None, stair: Sequence[int], packed: torch.Tensor,
    out: torch.Tensor,
) -> None:  # fmt: skip
    if not out.numel():
        return
    streams = [content, position, k, v, r, k[:, :0] if far_k is None else far_k, v[:, :0] if far_v is None else far_v]
    streams = [stream if stream.stride(2) == 1 else stream.contiguous() for stream in streams]
    strides = [step for stream in (*streams, out) for step in stream.stride()[:2]]
    (items, tokens, width), bounds = content.shape, Stair(*stair)
    sizes = (
        items, items // len(r), tokens, width, bounds.past, bounds.phase, bounds.segment, bounds.memory, bounds.band,
        bounds.known, bounds.capacity, bounds.rate, r.shape[1],
    )  # fmt: skip
    scale = math.log2(math.e) / math.sqrt(width)  # probabilities are powers of two
    _function(content.dtype)(
        *(stream.data_ptr() for stream in (*streams, out)), packed.data_ptr(), integers(strides), integers(sizes),
        scale, torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("ctxbench::relative_native")
def _(*_: Any) -> None:
    return None


@formula(torch.ops.ctxbench.relative_native)
def _flops(
    content: Any,
    position: Any,
    k: Any,
    v: Any,
    r: Any,
    far_k: Any,
    far_v: Any,
    stair: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Three products over what is visible."""
    items, tokens, width = content.shape
    return int(6 * items * width * visible_pairs(tokens, k.shape[1], Stair(*stair)))
