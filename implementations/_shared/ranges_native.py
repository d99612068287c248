"""Attention over ranges of keys on CPUs: what ``ranges.attend`` computes, in C++."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxbench.implementations._shared.lines import Placed
from ctxbench.implementations._shared.native import function, integers

SOURCE = Path(__file__).with_suffix(".cpp")
BACKWARD = Path(__file__).with_name("ranges_backward.cpp")


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
            then, where they are not lines, the bounds of every row ``[B, H, T]``, int32, which rise from row to row;
            and, where rows and keys stand anywhere, at which tokens, ``[B, H, T]`` and ``[B, H, S]``, int32;
            or, where the keys alone do, how many tokens from row 0 each is, ``[B, S]``, int32.
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


def backward(
    q: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, through: torch.Tensor | None,
    bias: torch.Tensor | None, ranges: Sequence[tuple[Any, ...]], farthest: int, scale: float, dq: torch.Tensor,
    table: torch.Tensor | None, gradients: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
) -> None:  # fmt: skip
    """Fill ``dq: [B, H, T, D]``, and add to the other gradients: they are to hold zeros, those of bfloat16 in float32.

    Args:
        q: as ``attend`` took it, like ``bias``, ``ranges``, ``farthest`` and ``scale``.
        out: what ``attend`` made, like ``lse``.
        grad: the gradient of ``out``.
        lse: see ``out``.
        through: the gradient of ``lse``, or None.
        bias: see ``q``.
        ranges: see ``q``; without bounds for every row, and without places.
        farthest: see ``q``.
        scale: see ``q``.
        dq: receives the gradient of q.
        table: ``[B, H, 2 F + 1]``, of each batch the gradient of a table of biases; or None.
        gradients: of each range those of keys and values ``[B, H_kv, S, D]``, or None where nobody wants them.
    """
    numbers = [number for one in ranges for number in _numbers(*one)]
    places = [number for pair in gradients for number in _places(*(pair or (None, None)))]
    shared = math.lcm(*(one[2] for one in ranges))  # heads that add to one gradient in some range
    B, H, T, D = q.shape
    pointers = (None if x is None else x.data_ptr() for x in (through, bias, table))
    strides = integers([stride for x in (q, out, grad, dq) for stride in x.stride()[:3]])
    _backward_function(q.dtype)(
        q.data_ptr(), out.data_ptr(), grad.data_ptr(), dq.data_ptr(), lse.data_ptr(), *pointers, strides, B, H, T, D,
        integers(numbers), integers(places), len(ranges), shared, farthest, scale, torch.get_num_threads(),
    )  # fmt: skip


def _places(dk: torch.Tensor | None, dv: torch.Tensor | None) -> tuple[int, ...]:
    """Gradients of a range as the struct ``Wanted`` lays them out."""
    if dk is None or dv is None:
        return (0,) * 8
    return dk.data_ptr(), dv.data_ptr(), *dk.stride()[:3], *dv.stride()[:3]


def _numbers(
    k: torch.Tensor, v: torch.Tensor, group: int, low: Placed, high: Placed, bias: int, every: int, ahead: int,
    since: torch.Tensor | None, begins: torch.Tensor | None = None, ends: torch.Tensor | None = None,
    row_places: torch.Tensor | None = None, key_places: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """A range as the struct of that name lays it out."""
    stored = k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3]
    tables = since, begins, ends, row_places, key_places, places
    at = (0 if table is None else table.data_ptr() for table in tables)
    return *stored, group, k.shape[2], *low, *high, bias, every, ahead, *at


@functools.cache
def _function(dtype: torch.dtype) -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    types = (*[pointer] * 5, *[integer] * 4, pointer, *[integer] * 2, ctypes.c_double, ctypes.c_int)
    return function(SOURCE, "attend", dtype, *types)


@functools.cache
def _backward_function(dtype: torch.dtype) -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    types = (*[pointer] * 9, *[integer] * 4, *[pointer] * 2, *[integer] * 3, ctypes.c_double, ctypes.c_int)
    return function(BACKWARD, "attend_backward", dtype, *types)
