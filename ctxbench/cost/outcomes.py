"""What the tracer's fast engine remembers of a call: what distinguishes it, and how its results are made again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ctxbench.cost.meter import Work, storage_bytes

# Values that say all there is to know of them. A call with any other argument is not remembered.
PLAIN = frozenset(
    {int, float, bool, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout}
    | {torch.memory_format}
)
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


class NotRemembered(Exception):
    """Results that do not say all there is to know of them."""


@dataclass(slots=True)
class Outcome:
    """What a call did, and how often it was met again."""

    recipe: Any
    works: tuple[Work, ...]
    rise: int  # most bytes alive at once above those before the call
    again: int = 0


class Memory(dict[Any, Outcome]):
    """Outcomes of one function or operator; ``describe`` says what of its arguments tells calls apart."""

    __slots__ = ("describe",)

    def __init__(self, describe: Callable[[Any], tuple[Any, ...] | None]):
        super().__init__()
        self.describe = describe

    def key(self, args: Any, kwargs: Any, form: Any = None) -> tuple[Any, ...] | None:
        """What distinguishes a call from others; None where that cannot be told."""
        seen = self.describe(args)
        if form is None and not kwargs:
            return seen
        named = self.describe(kwargs.items()) if kwargs else ()
        return None if seen is None or named is None else (seen, named, form)


class New(NamedTuple):
    """A tensor of its own storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes


class Operand(NamedTuple):
    """One of the tensors among the arguments, or, counted on from those, one of the new results so far."""

    number: int


class Several(NamedTuple):
    """A tuple or list of results."""

    kind: Any
    items: list[Any]


def recipe_of(out: Any, known: list[torch.Tensor]) -> tuple[Any, int]:
    """How to make such results again, and how many bytes of them are new.

    ``known`` are the tensors that a result can be instead of a new one; every new one is added.
    """
    if isinstance(out, torch.Tensor):
        for index, operand in enumerate(known):
            if out is operand:
                return Operand(index), 0
        size = storage_bytes(out)
        if metadata((out,)) is None or out.requires_grad or size != _reach(out) * out.element_size():
            raise NotRemembered
        known.append(out)
        return New(out.shape, out.stride(), out.dtype, size), size
    if isinstance(out, (tuple, list)):
        kind = type(out)._make if hasattr(out, "_make") else type(out)
        if type(kind) is type and kind not in (tuple, list) and not hasattr(out, "n_sequence_fields"):
            raise NotRemembered
        pairs = [recipe_of(item, known) for item in out]
        return Several(kind, [recipe for recipe, _ in pairs]), sum(size for _, size in pairs)
    if type(out) not in PLAIN:
        raise NotRemembered
    return out, 0


def _reach(tensor: torch.Tensor) -> int:
    """Elements from the first of a storage to the last of a tensor; fewer than the storage's for most views."""
    if 0 in tensor.shape:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + 1 + sum((size - 1) * stride for size, stride in steps)


def metadata(values: Any) -> tuple[Any, ...] | None:
    """What a call can know of its arguments on the meta device, None where that is not all that matters.

    The types keep 1, 1.0 and True apart.
    """
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is _Tensor or kind is _Parameter:
            dtype = value.dtype
            if not value.is_meta or dtype.is_complex:  # values that count; bits for conjugation
                return None
            found += value.shape, value.stride(), dtype
        elif kind in PLAIN:
            found += kind, value
        else:
            if kind is slice:
                value = value.start, value.stop, value.step
            elif not isinstance(value, (tuple, list)):
                return None
            inside = metadata(value)
            if inside is None:
                return None
            found.append(inside)
    return tuple(found)


def shapes(values: Any) -> tuple[Any, ...] | None:
    """The same without strides, which are no matter where nothing is made."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is _Tensor or kind is _Parameter:
            dtype = value.dtype
            if not value.is_meta or dtype.is_complex:
                return None
            found += value.shape, dtype
        elif kind in PLAIN:
            found += kind, value
        else:
            inside = shapes(value) if isinstance(value, (tuple, list)) else None
            if inside is None:
                return None
            found.append(inside)
    return tuple(found)
