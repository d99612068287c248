"""What common operators make of meta tensors, said directly.

Torch derives it with the machinery of its reference operators, in Python, up to a millisecond a call. A loop whose
operands grow from step to step meets no call twice, so that its count takes as long as that does. A rule gives None
where it does not apply: then torch decides. Tests hold every rule against torch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

aten = torch.ops.aten
META = torch.device("meta")
Result = torch.Tensor | None


def _like_first(x: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    return torch.empty(x.shape, dtype=x.dtype, device=META) if _falls(x, x.shape) and not kwargs else None


def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> Result:
    return None if half_to_float else _like_first(x)


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: Any) -> Result:
    fits = mask.dim() <= x.dim() and all(m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False))
    known = fits and type(value) is float and x.dtype.is_floating_point
    return _like_first(x) if known and _falls(mask, x.shape) else None


def _pointwise(a: torch.Tensor, b: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Result:
    """Two operands of one type, or a number that leaves the first its type."""
    if isinstance(b, torch.Tensor):
        return _elementwise(dtype or a.dtype, a, b) if a.dtype is b.dtype else None
    if a.dtype != torch.bool and (type(b) is int or (type(b) is float and a.dtype.is_floating_point)):
        return _elementwise(dtype or a.dtype, a)
    return None


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Result:
    return _elementwise(a.dtype, condition, a, b) if a.dtype is b.dtype and condition.dtype is torch.bool else None


def _elementwise(dtype: torch.dtype, *operands: torch.Tensor) -> Result:
    """What is made element by element, of operands that may be broadcast: its axes lie as those of its operands do."""
    shape = operands[0].shape
    if any(x.shape != shape for x in operands):
        shape = torch.broadcast_shapes(*(x.shape for x in operands))
    if all(_falls(x, shape) for x in operands):
        return torch.empty(shape, dtype=dtype, device=META)
    full = next((x for x in operands if x.shape == shape), None)
    if full is None or full.is_contiguous() or 0 in shape or 1 in shape[1:]:  # axes of one place may lie anywhere
        return None
    strides = full.stride()
    axes = sorted(range(len(shape)), key=lambda axis: -strides[axis])
    if not all(_falls(x, shape, axes) for x in operands):
        return None
    out = torch.empty([shape[axis] for axis in axes], dtype=dtype, device=META)
    return out.permute([axes.index(axis) for axis in range(len(axes))])


def _compared(a: torch.Tensor, b: Any) -> Result:
    return _pointwise(a, b, torch.bool)


def _slice_backward(grad: torch.Tensor, sizes: Any, *args: Any) -> Result:
    return torch.empty(sizes, dtype=grad.dtype, device=META) if grad.is_meta else None


def _cat(tensors: list[torch.Tensor], dim: int = 0) -> Result:
    first = tensors[0]
    shape, axis = list(first.shape), dim % max(first.dim(), 1)
    if not shape or not _falls(first, first.shape):
        return None
    for other in tensors[1:]:
        rest = list(other.shape)
        if other.dtype is not first.dtype or not other.is_meta or len(rest) != len(shape):
            return None
        shape[axis] += rest[axis]
        if rest[:axis] + rest[axis + 1 :] != shape[:axis] + shape[axis + 1 :]:
            return None
    return torch.empty(shape, dtype=first.dtype, device=META)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> Result:
    fit = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    if not fit or a.dtype is not b.dtype or not (a.is_meta and b.is_meta):
        return None
    return torch.empty((a.shape[0], a.shape[1], b.shape[2]), dtype=a.dtype, device=META)


def _clone(x: torch.Tensor, *, memory_format: Any = None) -> Result:
    fits = x.is_meta and memory_format is torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=META) if fits else None


def _ones(size: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Result:
    return torch.empty(size, dtype=dtype, device=META) if device == META and _is_usual(**kwargs) else None


def _new_zeros(x: torch.Tensor, size: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Result:
    return _ones(size, dtype=dtype or x.dtype, device=x.device if device is None else device, **kwargs)


def _arange(*bounds: Any, dtype: Any = None, **kwargs: Any) -> Result:
    first, last = (0, *bounds)[-2:]
    if type(first) is not int or type(last) is not int or last < first:
        return None
    return _ones((last - first,), dtype=dtype or torch.int64, **kwargs)


def _is_usual(layout: Any = None, pin_memory: Any = None) -> bool:
    return layout in (None, torch.strided) and not pin_memory


def _into(x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> Result:
    """For operators whose result has the shape of their first operand: one that is there already stays."""
    return out if out.shape == x.shape and out.is_meta and x.dtype is out.dtype else None


def _softmax_into(x: torch.Tensor, dim: int, dtype: Any = None, *, out: torch.Tensor) -> Result:
    return _into(x, out=out) if dtype in (None, x.dtype) else None


def _softmax_backward_into(grad: torch.Tensor, p: torch.Tensor, dim: int, dtype: Any, *, grad_input: Any) -> Result:
    return _into(grad, out=grad_input) if dtype is grad.dtype and p.shape == grad.shape else None


def _falls(x: torch.Tensor, shape: torch.Size, axes: Any = None) -> bool:
    """Whether strides fall from axis to axis, of a tensor that is expanded to this shape.

    Where two are equal the later axis must not be the larger one. Kernels keep to such an order of axes in what they
    make, whether a tensor has gaps or not, and also where it could be read as another format.
    """
    strides = (x if x.shape == shape else x.expand(shape)).stride()
    steps = [(strides[axis], shape[axis]) for axis in axes or range(len(shape)) if strides[axis]]
    return x.is_meta and all(above >= below for above, below in pairwise(steps))


RULES: dict[int, Callable[..., Result]] = {  # by the id of the operator, whose own hash is slow
    id(operator): rule  # type: ignore[misc]
    for operator, rule in {
        aten._softmax.default: _softmax,
        aten.bitwise_not.default: _like_first,
        aten.add.Tensor: _pointwise,
        aten.mul.Tensor: _pointwise,
        aten.sub.Tensor: _pointwise,
        aten.bitwise_and.Tensor: _pointwise,
        aten.eq.Tensor: _compared,
        aten.le.Tensor: _compared,
        aten.ge.Tensor: _compared,
        aten.lt.Tensor: _compared,
        aten.eq.Scalar: _compared,
        aten.slice_backward.default: _slice_backward,
        aten.where.self: _where,
        aten.tril.default: _like_first,
        aten.triu.default: _like_first,
        aten.masked_fill.Scalar: _masked_fill,
        aten.cat.default: _cat,
        aten.bmm.default: _bmm,
        aten.ones.default: _ones,
        aten.zeros.default: _ones,
        aten.new_zeros.default: _new_zeros,
        aten.arange.default: _arange,
        aten.arange.start: _arange,
        aten.clone.default: _clone,
        aten.softmax.int_out: _softmax_into,
        aten._softmax_backward_data.out: _softmax_backward_into,
    }.items()
}
