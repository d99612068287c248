"""Widths of the tournament of ``selection``, for formulas too: no torch here."""

from __future__ import annotations

GROUP = 4


def padded(width: int, count: int) -> int:
    """Columns, at least ``width``, that every round splits into whole groups; what is added is the least value."""
    size = 1
    while width > GROUP * count * size:
        size *= GROUP
    return -(-width // size) * size
