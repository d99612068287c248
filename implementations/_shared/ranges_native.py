"""Attention over ranges of keys on CPUs: what ``ranges.attend`` computes, in C++."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxbench.implementations._shared.lines import Placed
from ctxbench.implementations._shared.native import function, integers

SOURCE = Path(__file__).with_suffix(".cpp")


def attend(
    q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, bias: torch.Tensor | None, ranges: Sequence[tuple[Any, ...]],
    farthest: int, scale: float,
) -> None:  # fmt: skip
    """Fill ``out: [B, H, T, D]`` and ``lse: [B, H, T]``.

    Args:
        q: ``[B, H, T, D]``, channels side by side, as everywhere here.
        out: receives the output.
        lse: receives the log-sum-exps.
        bias: as ``ranges.attend`` takes it, in the dtype of q, float32 for bfloat16.
        ranges: of each range keys, values, how many heads share one of theirs, the two lines over rows, kind of bias,
            tokens from key to key, tokens from row 0 to key 0, and from which row on each key is seen, int32, or None;
            then, where they are not lines, the bounds of every row ``[B, H, T]``, int32, which rise from row to row.
        farthest: half of the width of a table of biases.
        scale: of the scores.
    """
    numbers = [number for one in ranges for number in _numbers(*one)]
    B, H, T, D = q.shape
    _function(q.dtype)(
        q.data_ptr(), out.data_ptr(), lse.data_ptr(), None if bias is None else bias.data_ptr(),
        integers([*q.stride()[:3], *out.stride()[:3]]), B, H, T, D, integers(numbers), len(ranges), farthest, scale,
        torch.get_num_threads(),
    )  # fmt: skip


def _numbers(
    k: torch.Tensor, v: torch.Tensor, group: int, low: Placed, high: Placed, bias: int, every: int, ahead: int,
    since: torch.Tensor | None, begins: torch.Tensor | None = None, ends: torch.Tensor | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """A range as the struct of that name lays it out."""
    places = k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3]
    tables = (0 if table is None else table.data_ptr() for table in (since, begins, ends))
    return *places, group, k.shape[2], *low, *high, bias, every, ahead, *tables


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    types = (*[pointer] * 5, *[integer] * 4, pointer, *[integer] * 2, ctypes.c_double, ctypes.c_int)
    return function(SOURCE, "attend", dtype, *types)
