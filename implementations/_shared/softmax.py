"""Softmax of a block of scores in place, which hides by where a column stands: in C++, in one visit of every row.

The same as PyTorch's ``add_`` of a mask and ``softmax``, in half of the time: nothing is read that is hidden, and a row
stays in the innermost cache from its maximum to its last quotient.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch

from ctxbench.cost.formulas import formula
from ctxbench.implementations._shared.native import function

SOURCE = Path(__file__).with_suffix(".cpp")


def band_softmax_(scores: torch.Tensor, front: int, low: int, high: int) -> torch.Tensor:
    """``scores: [g, n, m]``, contiguous, replaced by probabilities; what is hidden becomes 0.

    Row t sees the first ``front`` columns, and of those behind them ``t + low`` to ``t + high``, both included, as far
    as they are there. A row that sees nothing becomes 0; one that sees minus infinity alone NaN, as PyTorch makes it.
    """
    torch.ops.ctxbench.band_softmax_(scores, front, low, high)
    return scores


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    integer = ctypes.c_int64
    types = (ctypes.c_void_p, *[integer] * 6, ctypes.c_double, ctypes.c_int)
    return function(SOURCE, "band_softmax", dtype, *types)


_LIBRARY = torch.library.Library("ctxbench", "FRAGMENT")
_LIBRARY.define("band_softmax_(Tensor(a!) scores, int front, int low, int high) -> ()")


@torch.library.impl(_LIBRARY, "band_softmax_", "CPU")
def _(scores: torch.Tensor, front: int, low: int, high: int) -> None:
    if not scores.is_contiguous():
        raise ValueError(f"expected contiguous scores, received strides {scores.stride()} of {tuple(scores.shape)}")
    threads = torch.get_num_threads()
    _function(scores.dtype)(scores.data_ptr(), *scores.shape, front, low, high, math.log2(math.e), threads)


@torch.library.register_fake("ctxbench::band_softmax_")
def _(scores: torch.Tensor, front: int, low: int, high: int) -> None:
    return None


@formula(torch.ops.ctxbench.band_softmax_)
def _flops(*_: Any, **__: Any) -> int:
    """As of PyTorch's softmax, only products count."""
    return 0
