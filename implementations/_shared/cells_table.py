"""Launch parameters, limits and bytes of the kernels in ``cells``, for planning too: neither torch nor triton here."""

from __future__ import annotations

from typing import NamedTuple

from ctxbench.implementations._shared.flash_table import padded
from ctxbench.implementations._shared.tiles import Work
from ctxbench.method import YES, Support, no

MOST_ROWS = 1024  # places of the widest cell: one program holds all of it, a few channels at a time
USUAL_ROWS = 64  # places of a tile of smaller cells
MOST_NUMBERS = 4096  # of a tile, if its rows allow it
OF_WARP = 1024  # numbers of a tile: 32 a thread, which leaves room for many blocks at once
NARROWEST = 16  # channels of a tile: 32 bytes in 16 bits, the least that memory hands out


class Config(NamedTuple):
    """Places of a tile, channels of a tile, and warps of one launch."""

    rows: int
    width: int
    warps: int


def digit(pool: int) -> int:
    """The power of two of places that ``pool`` cells take in a tile."""
    return 1 << (pool - 1).bit_length()


def config(pool: int, levels: int, width: int) -> Config:
    """The shipped launch parameters for cells of ``pool``, ``pool ** 2``, ... tokens with ``width`` channels."""
    rows = max(digit(pool) ** levels, USUAL_ROWS)
    chosen = min(padded(width), max(NARROWEST, MOST_NUMBERS // rows))
    return Config(rows, chosen, max(1, rows * chosen // OF_WARP))


def support(pool: int, levels: int) -> Support:
    """Whether a tile holds the widest cell, the last of ``levels`` coarse scales."""
    places = digit(pool) ** levels
    if places > MOST_ROWS:
        return no(
            f"the pooling kernel holds cells of at most {MOST_ROWS} places, received pool={pool} over {levels} coarse "
            f"levels, which takes {places}; choose a smaller pool or fewer levels"
        )
    return YES


def moved(kernel: str, tokens: int, counts: tuple[int, ...], rows: int, itemsize: int) -> Work:
    """Bytes of one launch: each token and each cell once.

    Args:
        kernel: ``gather`` reads tokens and writes cells, ``spread`` reads both and writes tokens.
        tokens: those that are read, of one row of the batch and head.
        counts: cells of each level.
        rows: elements of a token of all sources, heads and the batch: ``sources * B * H * D``.
        itemsize: bytes of an element.
    """
    own, cells = tokens * rows * itemsize, sum(counts) * rows * itemsize
    return Work(loaded=own, stored=cells) if kernel == "gather" else Work(loaded=own + cells, stored=own)
