"""Sizes of the slabs of ``blocked`` and ``native``, for their formulas too: no torch here."""

from __future__ import annotations

# Scores at once, 16 MB of float32. Of 128 columns, ``topk`` shares among threads only what has more than 256 rows.
SLAB = 1 << 22
ROWS = 128  # fewest queries of a slab, so that its product runs at full speed
