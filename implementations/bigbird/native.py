"""The forward pass in C++ (``native.cpp``): nothing is gathered, and no scores leave a second-level cache.

One call packs keys and values in panels and works off all rows, those of the two ends included. Gradients are those of
``blocked``, which computes the probabilities again anyway.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.native import function, integers
from ctxbench.implementations._shared.native_table import padded
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.bigbird.blocked import Blocks
from ctxbench.implementations.bigbird.layer import Plan
from ctxbench.implementations.bigbird.params import PANEL

SOURCE = Path(__file__).with_suffix(".cpp")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, position: Position | None = None
) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, rotated before where they are; result of that shape, stored as ``[B, T, H, D]``."""
    if plan.num_blocks <= 2:
        return scaled_dot_product_attention(q, k, v)
    return _Native.apply(q, k, v, plan, None)


class _Native(Blocks):
    """The same function and gradients, computed in another way forward."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, line: torch.Tensor | None
    ) -> torch.Tensor:
        B, H, T, D = q.shape
        ctx.save_for_backward(q, k, v, line)
        ctx.plan = plan
        panels = B * H * plan.num_blocks * -(-plan.size // PANEL)
        keys = q.new_empty(panels * D * min(PANEL, padded(plan.size)))
        values = q.new_empty(panels * min(PANEL, plan.size) * padded(D))
        out = q.new_empty(B, T, H, D).transpose(1, 2)
        torch.ops.ctxbench.attend_blocks(q, k, v, plan.edges, plan.inner, plan.size, keys, values, out)
        return out


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    tensor, sizes = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)
    types = (
        *[tensor] * 3, *[sizes] * 3, tensor, sizes, tensor, sizes, *[tensor] * 3, sizes, sizes, ctypes.c_double,
        ctypes.c_int,
    )  # fmt: skip
    return function(SOURCE, "attend", dtype, *types)


_LIBRARY = torch.library.Library("ctxbench", "FRAGMENT")
_LIBRARY.define(
    "attend_blocks(Tensor q, Tensor k, Tensor v, Tensor edges, Tensor inner, int size, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor(c!) out) -> ()"
)


@torch.library.impl(_LIBRARY, "attend_blocks", "CPU")
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges: torch.Tensor, inner: torch.Tensor, size: int,
    keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    B, H, T, D = q.shape
    scale = math.log2(math.e) / math.sqrt(D)  # probabilities are powers of two
    strides = [integers(x.stride()[:3]) for x in (q, k, v)]
    tables = [(table.data_ptr(), integers(table.shape[1:])) for table in (edges, inner)]
    _function(q.dtype)(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *strides, *tables[0], *tables[1], keys.data_ptr(), values.data_ptr(),
        out.data_ptr(), integers(out.stride()[:3]), integers((B, H, T, D, size)), scale, torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("ctxbench::attend_blocks")
def _(*_: Any) -> None:
    return None


@formula(torch.ops.ctxbench.attend_blocks)
def _flops(q: Any, k: Any, v: Any, edges: Any, inner: Any, size: int, *_: Any, **__: Any) -> int:
    """Of the pairs that the lists name; the last block of each may be shorter."""
    B, H, T, D = q.shape
    blocks = -(-T // size)
    last = T - (blocks - 1) * size
    pairs = (size + last) * T
    pairs += sum(table.shape[1] * size * ((table.shape[2] - 1) * size + last) for table in (edges, inner))
    return int(4 * B * H * D * pairs)
