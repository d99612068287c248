"""Closed forms of ``flex``: the pairs in the tiles of TILE x TILE that a block list keeps."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, ceiling, floor

from ctxbench.implementations._shared.flex_table import TILE

SIDE = Integer(TILE)


def band_pairs(prefix: Expr, queries: Expr, left: Expr, right: Expr) -> Expr:
    """Pairs of ``queries`` behind a prefix that see it, ``left`` keys before their own and ``right`` after it."""
    keys, whole = prefix + queries, floor(queries / SIDE)
    # Tiles that lie between prefix and band for the first row of tiles, negative ones overlap; one more each row.
    between = floor((prefix - left) / SIDE) - ceiling(prefix / SIDE)
    beyond = keys - SIDE * (1 + ceiling((prefix + right) / SIDE))  # keys after the first band, a tile less each row
    rows = Min(whole, Max(0, ceiling(beyond / SIDE)))
    after = rows * beyond - SIDE * rows * (rows - 1) / 2
    first = Min(whole, Max(0, -between))
    skipped = (whole - first) * (between + first) + (whole - first) * (whole - first - 1) / 2
    rest = keys - SIDE * Max(0, between + whole)
    return SIDE * (whole * keys - after - SIDE * skipped) + (queries - whole * SIDE) * rest
