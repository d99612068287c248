"""What the segments of a sequence find in memory, in closed form."""

from __future__ import annotations

from sympy import Expr, Max, Min, ceiling, floor

from ctxbench.cost.symbols import T, param
from ctxbench.cost.terms import triangle

S, R, C, N, RATE, K = (
    param(name) for name in ("segment_len", "recent_len", "compressed_len", "item_len", "rate", "top_k")
)
WHOLE = floor(T / S)
REST = T - WHOLE * S
ARRIVING = S / N  # items of a segment
RECENT, COMPRESSED = R / N, C / N  # most items of each kind
PLAIN = Min(K, RECENT)  # items a segment reads when there are this many and none is compressed
EXTRA = Min(Max(K - RECENT, 0), COMPRESSED)  # and more, once compressed ones exist


def made(tokens: Expr, begin: Expr) -> Expr:
    """Rows and entries of the memory and of the segment so far, after some tokens; it began at ``begin``."""
    return Min(begin, R) + tokens - begin + Min(C, N * compressions(begin))


def compressions(begin: Expr) -> Expr:
    """Compressed items made before the segment that begins there; a whole number, as sizes are multiples."""
    return Max(0, begin - R) / (N * RATE)


def retrieved(segment: Expr) -> Expr:
    """Items that a segment reads, by its number."""
    begin = segment * S
    return Min(K, Min(begin, R) / N + Min(COMPRESSED, compressions(begin)))


def retrieved_before(segments: Expr) -> Expr:
    """Items that the first so many segments read, in sum.

    Segment t reads ``min(t S / n, PLAIN)`` items, and where more are wanted than R holds, up to ``EXTRA`` others from
    the first compression on.
    """
    growing = Min(segments, ceiling(PLAIN / ARRIVING))
    plain = ARRIVING * triangle(growing - 1) + (segments - growing) * PLAIN
    low, high = Min(segments, ceiling(R / S)), Min(segments, ceiling((R + N * RATE * EXTRA) / S))
    ramp = (S * (triangle(high - 1) - triangle(low - 1)) - R * (high - low)) / (N * RATE)
    return plain + ramp + (segments - high) * EXTRA
