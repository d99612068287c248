"""Launch parameters, and limits of the kernels in ``flash``, for planning too: neither torch nor triton here."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from ctxbench.method import DTYPE_BYTES, YES, Dims, Support, no

MOST_RANGES = 3  # of keys under one softmax
BACKWARD = Fraction(7, 2)  # products of the backward pass for one of the forward: seven instead of two
NATIVE_BACKWARD = Fraction(5, 2)  # the same of the kernels in C++: scores and their gradient are made once
DQ_ALONE = Fraction(3, 2)  # the same where keys and values need no gradient


class Config(NamedTuple):
    """Tile of queries, tile of keys, warps and pipeline stages of one launch."""

    rows: int
    columns: int
    warps: int
    stages: int


# By bytes of an element and padded head width: forward, dQ, dK and dV. 90: up to 227 KiB of shared memory a block.
# 80: at most 99 KiB, which every device since compute capability 8.0 has.
CONFIGS: dict[int, dict[tuple[int, int], tuple[Config, Config, Config]]] = {
    90: {
        (2, 16): (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
        (2, 32): (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
        (2, 64): (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
        (2, 128): (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        (2, 256): (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
        (4, 16): (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
        (4, 32): (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
        (4, 64): (Config(64, 32, 4, 2), Config(64, 32, 8, 2), Config(32, 32, 4, 2)),
        (4, 128): (Config(16, 32, 4, 2), Config(16, 32, 8, 1), Config(32, 16, 8, 1)),
        (4, 256): (Config(32, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 16, 8, 1)),
    },
    80: {
        (2, 16): (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
        (2, 32): (Config(128, 64, 4, 3), Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
        (2, 64): (Config(128, 64, 8, 3), Config(64, 64, 8, 2), Config(32, 64, 4, 2)),
        (2, 128): (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
        (2, 256): (Config(64, 32, 8, 2), Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
        (4, 16): (Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
        (4, 32): (Config(64, 32, 4, 2), Config(64, 16, 4, 2), Config(16, 64, 4, 2)),
        (4, 64): (Config(32, 32, 4, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2)),
        (4, 128): (Config(16, 32, 4, 1), Config(16, 32, 8, 1), Config(32, 16, 8, 1)),
        (4, 256): (Config(32, 32, 8, 1), Config(32, 16, 8, 1), Config(32, 16, 8, 1)),
    },
}
# Where CONFIGS would spill with several ranges, hidden keys or a bias, compiled by triton 3.6 or 3.7: by architecture,
# kernel, bytes and width.
HEAVY = {
    (90, "dq", 2, 256): Config(64, 16, 8, 2),
    (90, "dq", 4, 64): Config(32, 32, 8, 2),
    (90, "dkv", 4, 64): Config(32, 32, 8, 2),
    (90, "dq", 4, 128): Config(16, 16, 8, 1),
    (80, "dq", 4, 128): Config(16, 32, 4, 1),
    (90, "turned", 2, 128): Config(128, 32, 8, 3),
    (90, "turned", 2, 256): Config(64, 32, 8, 2),
    (90, "turned", 4, 64): Config(64, 16, 4, 2),
}
# Where those would with a table of biases.
TABLED = {
    (90, "forward", 2, 128): Config(128, 32, 8, 3),
    (90, "forward", 4, 64): Config(64, 16, 4, 2),
    (90, "dkv", 2, 64): Config(32, 64, 4, 2),
    (90, "dkv", 2, 128): Config(32, 64, 8, 2),
}
# Where dK and dV would, with a loop over the query heads that share a head of keys.
GROUPED = {
    (90, 2, 64): Config(32, 64, 4, 2),
    (90, 2, 128): Config(32, 64, 8, 2),
    (80, 2, 128): Config(32, 32, 8, 2),
    (80, 2, 256): Config(32, 32, 8, 1),
    (90, 4, 64): Config(32, 32, 8, 2),
}
# Where forward over lists would spill with four warps: by architecture, bytes, width and whether a table is added.
LISTED = {
    (90, 2, 128, True): Config(64, 64, 8, 2),
    (90, 2, 256, False): Config(64, 32, 8, 3),
    (90, 2, 256, True): Config(64, 32, 8, 3),
}
# Of the gradient of a table of biases, by bytes of an element and of a row, at most: its diagonals cost more than its
# products.
OF_TABLE = {
    2: {256: Config(32, 32, 4, 1), 512: Config(16, 16, 4, 1)},
    4: {256: Config(16, 16, 4, 1), 512: Config(16, 16, 8, 1), 1024: Config(16, 16, 4, 1)},
}
TURN_HEADS = 4  # of a batch that a program turns one after the other, by angles that it reads once
# Channels that products of rows take at a time, by bytes and width, where operands with all of them would spill.
CHUNKS = {(4, 256): 32}
MOST_HEADS = 65535  # blocks along the second axis of a grid
KERNELS = ("forward", "dq", "dkv")
WIDEST = {2: 256, 4: 256}  # channels of a head by bytes of an element: the kernels have no tiles beyond
NARROW = {2: 128, 4: 128}  # the same where a kernel gathers rows beside


def padded(width: int) -> int:
    """The power of two, at least 16, that a head of ``width`` channels takes in a tile."""
    return max(16, 1 << (width - 1).bit_length())


def chunk(width: int, itemsize: int) -> int:
    """Channels of a head that products of rows take at a time: all but where CHUNKS says otherwise."""
    return CHUNKS.get((itemsize, padded(width)), padded(width))


def turn_rows(width: int) -> int:
    """Rows of a tile of the kernel that turns keys: as many pairs of channels for each width."""
    return 4096 // padded(width)


def config(
    kernel: str, width: int, itemsize: int, architecture: int, heavy: bool = False, grouped: bool = False,
    table: bool = False,
) -> Config:  # fmt: skip
    """The shipped launch parameters of one kernel; KeyError for a head or dtype the template does not take.

    ``turned`` is ``forward`` of queries that it turns first. ``heavy``: there is more than one range, or a bias, or
    hidden keys. ``grouped``: query heads share a head of keys. ``table``: the bias is a table.
    """
    if kernel == "table":
        return OF_TABLE[itemsize][max(256, padded(width) * itemsize)]
    launched = "forward" if kernel == "turned" else kernel
    usual = CONFIGS[architecture][itemsize, padded(width)][KERNELS.index(launched)]
    if kernel == "dkv" and grouped:
        usual = GROUPED.get((architecture, itemsize, padded(width)), usual)
    of = architecture, kernel, itemsize, padded(width)
    usual = HEAVY.get(of, usual) if heavy else usual
    return TABLED.get(of, usual) if table else usual


def listed_config(
    kernel: str, width: int, itemsize: int, architecture: int, size: int, table: bool = False
) -> Config:  # fmt: skip
    """The same for the kernels over lists of blocks of ``size`` tokens: no tile larger than a block has to be.

    ``table``: a table of biases is added.
    """
    chosen, block = config(kernel, width, itemsize, architecture, heavy=True), padded(size)
    if kernel == "forward":
        chosen = LISTED.get((architecture, itemsize, padded(width), table), chosen)
    rows, columns = min(chosen.rows, 64, block), min(chosen.columns, block)
    return Config(rows, columns, chosen.warps if rows == chosen.rows else 4, chosen.stages)


def support(dims: Dims, dtype: str, kernels: str = "flash", most: dict[int, int] = WIDEST) -> Support:
    """Whether the kernels take heads of this width in this dtype; fp64 has no matrix instructions in Triton.

    ``kernels``: what they are called; ``most``: channels they hold, by bytes of an element.
    """
    taken = [name for name, size in DTYPE_BYTES.items() if size in WIDEST]
    if dtype not in taken:
        return no(f"the {kernels} kernels compute in {', '.join(taken)}, not in {dtype}")
    widest, heads = most[DTYPE_BYTES[dtype]], dims.batch_size * dims.num_heads
    if dims.head_dim > widest:
        return no(f"in {dtype} the {kernels} kernels hold heads of at most {widest} channels, received {dims.head_dim}")
    if heads > MOST_HEADS:
        return no(f"the {kernels} kernels take at most {MOST_HEADS} heads in a batch, received {heads}")
    return YES


def support_at_once(dims: Dims, dtype: str) -> Support:
    """The same where one launch has the heads of all layers, as in a diagonal schedule."""
    return support(dims.replace(batch_size=dims.batch_size * dims.num_layers), dtype)
