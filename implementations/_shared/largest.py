"""The largest values of every row, in C++: exact, and found while the row lies in the caches.

What ``selection`` does in rounds of PyTorch's operators takes one visit of a row and another of the few blocks that
hold anything large; rows are shared among threads one by one.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.native import function

SOURCE = Path(__file__).with_suffix(".cpp")


def largest_(values: torch.Tensor, found: torch.Tensor, columns: torch.Tensor) -> None:
    """Write the ``count`` largest of each row of ``values: [n, m]`` to ``found`` and their columns to ``columns``.

    Both are ``[n, count]`` in one piece, columns int32 and ascending. Of equal values the first are taken; NaN is
    larger than any number, as for ``topk``. Rows of values lie evenly apart, each in one piece.
    """
    torch.ops.ctxbench.largest_(values, found, columns)


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    return function(SOURCE, "largest", dtype, pointer, *[integer] * 4, pointer, pointer, ctypes.c_int)


_LIBRARY = torch.library.Library("ctxbench", "FRAGMENT")
_LIBRARY.define("largest_(Tensor values, Tensor(a!) found, Tensor(b!) columns) -> ()")


@torch.library.impl(_LIBRARY, "largest_", "CPU")
def _(values: torch.Tensor, found: torch.Tensor, columns: torch.Tensor) -> None:
    (rows, m), count = values.shape, found.shape[1]
    if not 1 <= count <= m < 1 << 31:
        raise ValueError(f"expected 1 to {m} of rows of less than 2^31 columns, received {count} of {m}")
    if found.shape != columns.shape or len(found) != rows or found.dtype is not values.dtype:
        raise ValueError(
            f"expected results of {rows} rows and {values.dtype}, received {tuple(found.shape)} {found.dtype} and "
            f"{tuple(columns.shape)}"
        )
    pieces = (values.stride(1) == 1 or m == 1) and found.is_contiguous() and columns.is_contiguous()
    if not pieces or columns.dtype is not torch.int32:
        raise ValueError(
            f"expected rows and results in one piece, and int32 columns, received strides {values.stride()}, "
            f"{found.stride()} and {columns.stride()}, and {columns.dtype}"
        )
    _function(values.dtype)(
        values.data_ptr(), rows, m, values.stride(0), count, found.data_ptr(), columns.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


@torch.library.register_fake("ctxbench::largest_")
def _(values: torch.Tensor, found: torch.Tensor, columns: torch.Tensor) -> None:
    return None


@formula(torch.ops.ctxbench.largest_)
def _flops(*_: Any, **__: Any) -> int:
    """As of ``topk``, comparing is not counted."""
    return 0
