"""What common operators make of meta tensors, said directly.

Torch derives it with the machinery of its reference operators, in Python, up to a millisecond a call. A loop whose
operands grow from step to step meets no call twice, so that its count takes as long as that does. A rule gives None
where it does not apply: then torch decides. Tests hold every rule against torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
META = torch.device("meta")
Result = torch.Tensor | None


def _like_first(x: torch.Tensor, *args: Any, **kwargs: Any) -> Result:
    return torch.empty(x.shape, dtype=x.dtype, device=META) if _dense(x) and not kwargs else None


def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> Result:
    return None if half_to_float else _like_first(x)


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: Any) -> Result:
    fits = mask.dim() <= x.dim() and all(m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False))
    return _like_first(x) if fits and type(value) is float and x.dtype.is_floating_point else None


def _pointwise(a: torch.Tensor, b: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Result:
    """Two operands of one type, or a number that leaves the first its type; none of them turned round."""
    if type(b) is torch.Tensor:
        if a.dtype is not b.dtype or not (_dense(a) and _dense(b)):
            return None
        shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)
        if len(shape) in (4, 5) and shape != a.shape and shape != b.shape:
            return None
    elif _dense(a) and (type(b) is int or (type(b) is float and a.dtype.is_floating_point)) and a.dtype != torch.bool:
        shape = a.shape
    else:
        return None
    return torch.empty(shape, dtype=dtype or a.dtype, device=META)


def _compared(a: torch.Tensor, b: Any) -> Result:
    return _pointwise(a, b, torch.bool)


def _slice_backward(grad: torch.Tensor, sizes: Any, *args: Any) -> Result:
    return torch.empty(sizes, dtype=grad.dtype, device=META) if grad.is_meta else None


def _cat(tensors: list[torch.Tensor], dim: int = 0) -> Result:
    first = tensors[0]
    shape, axis = list(first.shape), dim % max(first.dim(), 1)
    if not _dense(first) or not shape:
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


def _ones(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Result:
    if device != META or layout not in (None, torch.strided) or pin_memory:
        return None
    return torch.empty(size, dtype=dtype, device=META)


def _into(x: torch.Tensor, *args: Any, out: torch.Tensor, **kwargs: Any) -> Result:
    """For operators whose result has the shape of their first operand: one that is there already stays."""
    return out if out.shape == x.shape and out.is_meta and x.dtype is out.dtype else None


def _softmax_into(x: torch.Tensor, dim: int, dtype: Any = None, *, out: torch.Tensor) -> Result:
    return _into(x, out=out) if dtype in (None, x.dtype) else None


def _softmax_backward_into(grad: torch.Tensor, p: torch.Tensor, dim: int, dtype: Any, *, grad_input: Any) -> Result:
    return _into(grad, out=grad_input) if dtype is grad.dtype and p.shape == grad.shape else None


def _dense(x: torch.Tensor) -> bool:
    """Whether a tensor is contiguous and can be read as nothing else."""
    return x.is_meta and x.is_contiguous() and not (x.dim() in (4, 5) and _channels_last(x))


def _channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


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
        aten.tril.default: _like_first,
        aten.triu.default: _like_first,
        aten.masked_fill.Scalar: _masked_fill,
        aten.cat.default: _cat,
        aten.bmm.default: _bmm,
        aten.ones.default: _ones,
        aten.zeros.default: _ones,
        aten.softmax.int_out: _softmax_into,
        aten._softmax_backward_data.out: _softmax_backward_into,
    }.items()
}
