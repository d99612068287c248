"""How many rows and entries the segments of a sequence see, in closed form; the whole segments, then the rest."""

from __future__ import annotations

from typing import NamedTuple

from sympy import Expr, Integer, Max, Min, ceiling, floor

from ctxbench.cost.symbols import T, param
from ctxbench.cost.terms import triangle
from ctxbench.implementations._shared.staircase import BLOCK

S, M, C, RATE = (param(name) for name in ("segment_len", "mem_len", "compressed_len", "rate"))
WHOLE = floor(T / S)
REST = T - WHOLE * S
LAST = S * (ceiling(T / S) - 1)  # token at which the last segment begins


class Segments(NamedTuple):
    """``count`` segments of ``rows`` queries, with ``before`` rows and entries in front of them in sum."""

    rows: Expr
    count: Expr
    before: Expr

    @property
    def keys(self) -> Expr:
        """Rows and entries of all segments, in sum."""
        return self.rows * self.count + self.before

    @property
    def rectangles(self) -> Expr:
        """Pairs of all queries and all keys of their segment."""
        return self.rows * self.keys

    @property
    def visible(self) -> Expr:
        """Pairs up to each query's own token."""
        return triangle(self.rows) * self.count + self.rows * self.before

    @property
    def blocks(self) -> Expr:
        """Pairs of the one-shot operator: of the segment's own keys, those up to the block's end."""
        whole = floor(self.rows / BLOCK)
        own = BLOCK**2 * triangle(whole) + (self.rows - whole * BLOCK) * self.rows
        return own * self.count + self.rows * self.before


def evicted(begin: Expr | int) -> Expr:
    """Rows that left the memory before the segment that begins at a token."""
    return Max(0, begin - M)


def entries(begin: Expr | int) -> Expr:
    """Compressed entries that the segment sees."""
    return Min(C, evicted(begin) / RATE)


def before(begin: Expr | int) -> Expr:
    """Rows of memory and entries that the segment sees in front of itself."""
    return Min(begin, M) + entries(begin)


def sequence() -> tuple[Segments, Segments]:
    """The whole segments and the rest; a rest of 0 rows counts nothing.

    Segment t begins at t S. Its memory grows until t S >= M, from then on its entries do, until t S >= M + c C.
    """
    some = Min(REST, 1)
    growing = Min(WHOLE, floor(M / S) + 1)
    memory = S * triangle(growing - 1) + (WHOLE - growing) * M
    low, high = Min(WHOLE, ceiling(M / S)), Min(WHOLE, ceiling((M + RATE * C) / S))
    compressed = (S * (triangle(high - 1) - triangle(low - 1)) - M * (high - low)) / RATE + (WHOLE - high) * C
    return Segments(S, WHOLE, memory + compressed), Segments(REST, some, before(WHOLE * S) * some)


def longest() -> Expr:
    """Most keys a segment of the sequence has."""
    return Max(before(Max(WHOLE * S - S, 0)) + Min(S, T), before(WHOLE * S) + REST)


def full_segments() -> Expr:
    """Whole segments that see as many rows and entries as any can."""
    return WHOLE - Min(WHOLE, ceiling((M + RATE * C) / S))


def compressions() -> Expr:
    """How often rows leave the memory before the last segment."""
    return Max(0, ceiling(T / S) - 1 - floor(M / S))


def state_rows(tokens: Expr = T) -> Expr:
    """Rows a layer carries after some tokens: the memory and the segment so far."""
    return Min(tokens, M + tokens - floor(tokens / S) * S)


def state_entries(tokens: Expr = T) -> Expr:
    """Compressed entries a layer carries after some tokens."""
    return entries(floor(tokens / S) * S)


ONE = Integer(1)
