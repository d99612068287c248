"""Launch parameters, limits and counts of the kernels in ``decode``, for planning too: no torch, no triton here."""

from __future__ import annotations

from typing import NamedTuple

from ctxbench.implementations._shared.flash_table import MOST_HEADS, padded
from ctxbench.method import DTYPE_BYTES, YES, Support, no

# Blocks that share the keys of one call: two for each multiprocessor of the largest device. A constant, so that a
# result has the same bits on every device.
BLOCKS = 264
FEW = 16  # queries of one call that are taken as decoding: with more, rows of queries fill a device by themselves
WIDEST = {2: 256, 4: 256}  # channels of a head by bytes of an element


class Config(NamedTuple):
    """Tile of packed queries, tile of keys, warps and pipeline stages of one launch."""

    rows: int
    columns: int
    warps: int
    stages: int


def config(width: int, itemsize: int) -> Config:
    """What fits the 99 KiB of shared memory that a block has everywhere: keys and values of each stage."""
    row = padded(width) * itemsize
    return Config(16, 64 if row <= 256 else 32, 4, 3 if row <= 256 else 2)


def splits(heads: int, tiles: int) -> int:
    """Into how many parts the ``tiles`` of keys are cut, where ``heads`` blocks work on each part."""
    return max(1, min(tiles, -(-BLOCKS // heads)))


def chunk(heads: int, keys: int, columns: int) -> int:
    """Keys of each part but the last: whole tiles of ``columns`` keys."""
    tiles = -(-keys // columns)
    return -(-tiles // splits(heads, tiles)) * columns


def visible_pairs(queries: int, keys: int, causal: bool) -> int:
    """How many (query, key) pairs a call has; causal: the last query sees all keys, each one before it one less."""
    hidden = queries * (queries - 1) // 2 if causal else 0
    return queries * keys - hidden


def support(width: int, heads: int, dtype: str) -> Support:
    """Whether the kernels take ``heads`` heads in a batch of this width in this dtype."""
    taken = [name for name, size in DTYPE_BYTES.items() if size in WIDEST]
    if dtype not in taken:
        return no(f"the decoding kernels compute in {', '.join(taken)}, not in {dtype}")
    widest = WIDEST[DTYPE_BYTES[dtype]]
    if width > widest:
        return no(f"in {dtype} the decoding kernels hold heads of at most {widest} channels, received {width}")
    if heads > MOST_HEADS:
        return no(f"the decoding kernels take at most {MOST_HEADS} heads in a batch, received {heads}")
    return YES
