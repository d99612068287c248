"""Which keys a query sees, as two lines over its position, and the exact counts of it; neither torch nor triton here.

A line is monotone, so that everything a kernel or a planner asks has a closed form: the keys that a tile of queries
meets, those that all its queries see, the queries that see a tile of keys, and how many pairs there are.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

OPEN, LEVEL, SLOPE, STEPS = range(4)  # no bound; the same for all queries; one key further each query; any other line

PLAIN, SLOPES, TABLE = range(3)  # what is added to scores: nothing; a slope times the distance; a number by distance


class Line(NamedTuple):
    """``floor((p + shift) / step) * stride + base``, where p is the position of a query.

    ``Line()`` is p itself, ``Line(base=1)`` one past it. ``Line(stride=0, base=n)`` is n for all queries,
    ``Line(step=c, stride=c)`` the begin of the query's block of c, ``Line(step=c)`` the number of whole blocks before.
    """

    step: int = 1
    stride: int = 1
    shift: int = 0
    base: int = 0

    def at(self, position: int) -> int:
        return (position + self.shift) // self.step * self.stride + self.base


class Placed(NamedTuple):
    """A line over the rows 0 .. T of a query tensor instead of positions, in the one form that kernels read.

    ``floor((row + shift) / step) * stride + base`` with ``0 <= shift < step`` and no number out of proportion to the
    tensors, so that 32 bits hold what kernels make of it. ``kind`` says how much of it there is.
    """

    kind: int = OPEN
    base: int = 0
    step: int = 1
    stride: int = 0
    shift: int = 0

    def at(self, row: int) -> int:
        return (row + self.shift) // self.step * self.stride + self.base


def place(line: Line | None, offset: int, queries: int, keys: int) -> Placed:
    """``line`` for ``queries`` rows from position ``offset`` on, equal wherever it lies within 0 .. keys.

    Raises:
        ValueError: for a step below 1 or a stride below 0, whose line would not be monotone.
    """
    if line is None:
        return Placed()
    if line.step < 1 or line.stride < 0:
        raise ValueError(f"a line has step at least 1 and stride at least 0, received {line}")
    whole, shift = divmod(line.shift + offset, line.step)
    base = line.base + whole * line.stride
    if line.stride == 0:
        return Placed(LEVEL, min(max(base, 0), keys))
    top = max(queries - 1 + shift, 0) // line.step * line.stride
    base = min(max(base, -top), keys)  # below 0 or beyond the keys for all rows, and still so
    kind = SLOPE if line.step == line.stride == 1 else STEPS
    return Placed(kind, base, line.step, line.stride, shift)


def visible_pairs(queries: int, keys: int, low: Line | None = None, high: Line | None = None, offset: int = 0) -> int:
    """How many pairs of a query and a key from ``low`` to before ``high`` there are."""
    first, end = place(low, offset, queries, keys), place(high, offset, queries, keys)
    return placed_pairs(queries, keys, first, end)


def placed_pairs(queries: int, keys: int, low: Placed, high: Placed) -> int:
    """``visible_pairs`` of lines that are placed already."""
    if not _ordered(queries, low, high):  # bounds that cross: nothing simpler is exact
        return sum(max(0, _clamped(high, row, keys, keys) - _clamped(low, row, keys, 0)) for row in range(queries))
    return _sum(high, queries, keys, queries * keys) - _sum(low, queries, keys, 0)


def _clamped(line: Placed, row: int, keys: int, otherwise: int) -> int:
    return otherwise if line.kind == OPEN else min(max(line.at(row), 0), keys)


def _ordered(queries: int, low: Placed, high: Placed) -> bool:
    """Whether ``low`` is seen never to pass ``high``: by their equal steps, or by the straight lines around them."""
    if OPEN in (low.kind, high.kind):
        return True
    if low[2:] == high[2:]:
        return low.base <= high.base
    return all(
        low.base + Fraction((row + low.shift) * low.stride, low.step)
        <= high.base + Fraction((row + high.shift + 1 - high.step) * high.stride, high.step)
        for row in (0, queries - 1)
    )


def _sum(line: Placed, queries: int, keys: int, otherwise: int) -> int:
    """Sum of a line over all rows, clamped to 0 .. keys."""
    if line.kind == OPEN:
        return otherwise

    def below(end: int) -> int:  # over the numerators 0 .. end
        whole, rest = divmod(end, line.step)
        last = min(max(whole * line.stride + line.base, 0), keys)
        return line.step * sum_clamped(line.base, line.stride, whole, keys) + rest * last

    return below(queries + line.shift) - below(line.shift)


def sum_clamped(start: int, stride: int, count: int, high: int) -> int:
    """Sum of ``start + stride * i`` over i < count, each clamped to 0 .. high."""
    return _sum_positive(start, stride, count) - _sum_positive(start - high, stride, count)


def _sum_positive(start: int, stride: int, count: int) -> int:
    if stride == 0:
        return max(start, 0) * count
    skipped = min(max(0, -(start // stride)), count)
    left = count - skipped
    return left * (start + skipped * stride) + stride * (left * (left - 1) // 2)
