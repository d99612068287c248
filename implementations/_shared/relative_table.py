"""Launch parameters, limits and counts of the kernels in ``relative_kernels``; neither torch nor triton here."""

from __future__ import annotations

from typing import NamedTuple

from ctxbench.implementations._shared import lines
from ctxbench.implementations._shared.flash_table import padded
from ctxbench.implementations._shared.lines import Line
from ctxbench.method import DTYPE_BYTES, YES, Dims, Support, no

FORWARD = 3  # products of a visible pair: contents, distances, values
# dQ: scores again with one new block of distances, dP, and two parts of dQ. By keys: scores with both blocks, dP, dV,
# dK. By distances: both blocks of keys for scores and for dP, the distances themselves, dR.
BACKWARD = 5 + 6 + 6
ENDLESS = 1 << 30  # rows of a segment that never ends
KERNELS = ("forward", "dq", "dkv", "dr")
WIDEST = {2: 128, 4: 128}  # channels of a head by bytes of an element: the kernels have no tiles beyond
# Channels that products of rows take at a time, by bytes and width, where operands with all of them would spill.
CHUNKS = {(4, 64): 32, (4, 128): 32}
MOST_HEADS = 65535  # blocks along the second axis of a grid


class Tile(NamedTuple):
    """Side of a tile, warps and pipeline stages of one launch."""

    side: int
    warps: int
    stages: int


class Stair(NamedTuple):
    """Who sees what, as plain integers: one argument of the operators.

    Row i of T stands at row ``i + past`` of the keys and lies ``(i + phase) mod segment`` rows into its segment. It
    sees the keys from ``memory`` rows before its segment on, or, where ``band``, its last ``memory`` ones; up to
    itself, or all later ones where not ``causal``. ``nearest`` is the first distance that has a key of its own.
    Entries: ``known`` ones exist before the rows, one more for each ``rate`` rows that leave the memory; the last
    ``capacity`` of them are seen.
    """

    segment: int = ENDLESS
    memory: int = 0
    past: int = 0
    phase: int = 0
    band: int = 0
    causal: int = 1
    nearest: int = 0
    known: int = 0
    capacity: int = 0
    rate: int = 1


# By bytes of an element and padded head width, in the order of KERNELS: without entries, and with them, where a second
# loop takes registers too. A side of 64 is what a Hopper's own matrix instruction needs; other kernels would spill.
PLAIN = (Tile(32, 4, 2), Tile(32, 4, 2), Tile(32, 4, 2), Tile(32, 4, 2))
WIDE = (Tile(64, 4, 2), *PLAIN[1:])
WIDE_ONCE = (*WIDE[:3], Tile(32, 4, 1))  # as NARROW, compiled by triton 3.6
SMALL = (Tile(32, 4, 2), Tile(16, 4, 2), Tile(16, 4, 2), Tile(16, 4, 2))
SMALL_ENTRIES = (*SMALL[:2], Tile(16, 4, 1), Tile(16, 4, 1))
NARROW = (*SMALL[:3], Tile(16, 4, 1))  # four warps have too few registers for tiles that come ahead
NARROW_ENTRIES = (*SMALL[:2], Tile(16, 8, 2), Tile(16, 4, 1))
LAST_SMALL = (*PLAIN[:3], Tile(16, 4, 2))
# Heads of 128 channels: wide tiles where two sums fit, sixteen rows elsewhere.
WIDEST_PLAIN = (Tile(32, 8, 1), Tile(16, 4, 2), Tile(32, 8, 1), Tile(16, 4, 2))
WIDEST_ENTRIES = (Tile(16, 4, 2), *WIDEST_PLAIN[1:3], Tile(16, 8, 1))
WIDE_FLOAT = (Tile(16, 8, 1),) * 4  # float32 by chunks of channels
Pair = tuple[tuple[Tile, ...], tuple[Tile, ...]]
CONFIGS: dict[int, dict[tuple[int, int], Pair]] = {
    90: {
        (2, 16): (WIDE, PLAIN),
        (2, 32): (WIDE, PLAIN),
        (2, 64): (WIDE_ONCE, LAST_SMALL),
        (2, 128): (WIDEST_PLAIN, (Tile(16, 8, 1), *WIDEST_ENTRIES[1:])),
        (4, 16): (NARROW, NARROW_ENTRIES),
        (4, 32): (SMALL, SMALL_ENTRIES),
        (4, 64): (WIDE_FLOAT, WIDE_FLOAT),
        (4, 128): (WIDE_FLOAT, WIDE_FLOAT),
    },
    80: {
        (2, 16): (PLAIN, PLAIN),
        (2, 32): (PLAIN, PLAIN),
        (2, 64): (PLAIN, LAST_SMALL),
        (2, 128): (WIDEST_PLAIN, WIDEST_ENTRIES),
        (4, 16): (SMALL, SMALL_ENTRIES),
        (4, 32): (NARROW, SMALL_ENTRIES),
        (4, 64): (WIDE_FLOAT, WIDE_FLOAT),
        (4, 128): (WIDE_FLOAT, WIDE_FLOAT),
    },
}


def chunk(width: int, itemsize: int) -> int:
    """Channels of a head that products of rows take at a time, see ``flash_rows``."""
    return CHUNKS.get((itemsize, padded(width)), padded(width))


def tile(kernel: str, width: int, itemsize: int, architecture: int, far: bool) -> Tile:
    """The shipped launch parameters of one kernel; KeyError for a head or dtype that none takes."""
    return CONFIGS[architecture][itemsize, padded(width)][far][KERNELS.index(kernel)]


def support(dims: Dims, dtype: str) -> Support:
    """Whether the kernels take heads of this width in this dtype; fp64 has no matrix instructions in Triton."""
    taken = [name for name, size in DTYPE_BYTES.items() if size in WIDEST]
    if dtype not in taken:
        return no(f"the kernels of the relative term compute in {', '.join(taken)}, not in {dtype}")
    widest, heads = WIDEST[DTYPE_BYTES[dtype]], dims.batch_size * dims.num_heads
    if dims.head_dim > widest:
        return no(
            f"in {dtype} the kernels of the relative term hold heads of at most {widest} channels, "
            f"received {dims.head_dim}"
        )
    if heads > MOST_HEADS:
        return no(f"the kernels of the relative term take at most {MOST_HEADS} heads in a batch, received {heads}")
    return YES


def visible_pairs(rows: int, keys: int, stair: Stair) -> int:
    """How many pairs of a row and a key or entry that it sees there are."""
    if stair.band:
        low = Line(base=stair.past - stair.memory + 1)
    else:
        base = stair.past - stair.phase - stair.memory
        low = Line(stair.segment, stair.segment, stair.phase, base)
    near = lines.visible_pairs(rows, keys, low, Line(base=stair.past + 1) if stair.causal else None)
    return near + sum(
        entries * (min(end, rows) - max(begin, 0)) for begin, end, entries in _segments(rows, stair) if entries
    )


def _segments(rows: int, stair: Stair) -> list[tuple[int, int, int]]:
    """First row, one past the last, and entries seen, of every segment; none where no entries are."""
    if not stair.capacity:
        return []
    found = []
    for begin in range(-stair.phase, rows, stair.segment):
        left = max(0, begin + stair.past - stair.memory)
        found.append((begin, begin + stair.segment, min(stair.capacity, stair.known + left // stair.rate)))
    return found


def row_parts(distances: int, rows: int, heads: int, stair: Stair, side: int) -> int:
    """Over how many programs the segments of one tile of distances are spread, so that a device is full: 512 programs.

    A fixed number of the sizes alone, so that a sum has the same order everywhere.
    """
    if stair.band:
        return 1
    segments = (rows - 1 + stair.phase) // stair.segment + 1
    return max(1, min(segments, 512 // (-(-distances // side) * heads)))
