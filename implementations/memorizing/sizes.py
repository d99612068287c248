"""Sizes of the slabs of ``blocked``, and how many pairs a search visits, for formulas too: no torch here."""

from __future__ import annotations

# Scores at once, 16 MB of float32. Of 128 columns, ``topk`` shares among threads only what has more than 256 rows.
SLAB = 1 << 22
ROWS = 128  # fewest queries of a slab, so that its product runs at full speed

PANEL = 64  # keys that `native` packs together
FEW = 4  # queries for which it packs none


def pairs(T: int, N: int, past: int, length: int, most: int) -> int:
    """Pairs of one of T queries and one of N keys that it may pick: the ``most`` last before its segment of ``length``.

    ``past`` keys are before the first segment.
    """
    begins = range(0, T, length)
    return sum(min(length, T - begin) * min(past + begin, N, most) for begin in begins)
