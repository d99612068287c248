"""Launch parameters and limits of the kernels in ``gathered``, for planning too: neither torch nor triton here."""

from __future__ import annotations

from ctxbench.implementations._shared import flash_table
from ctxbench.implementations._shared.flash_table import Config
from ctxbench.method import Dims, Support, no

MOST_CLUSTERS = 4096  # a program finds its own among all, held in registers


def config(kernel: str, width: int, itemsize: int, architecture: int) -> Config:
    """As the flash kernels', but where addresses of gathered rows leave too few registers."""
    if kernel == "dkv" and itemsize == 4 and flash_table.padded(width) == 64:
        return Config(16, 32, 4, 2)
    if kernel == "forward" and itemsize == 2 and flash_table.padded(width) == 16:
        return Config(64, 64, 4, 3)
    if kernel == "dq" and itemsize == 4 and flash_table.padded(width) == 32 and architecture == 80:
        return Config(32, 16, 4, 2)
    if kernel == "dkv" and itemsize == 2 and flash_table.padded(width) == 16 and architecture == 80:
        return Config(64, 32, 4, 3)
    return flash_table.config(kernel, width, itemsize, architecture)


def support(dims: Dims, num_clusters: int, dtype: str) -> Support:
    """Whether the kernels take these heads and so many clusters."""
    if num_clusters > MOST_CLUSTERS:
        return no(f"the gathering kernels take at most {MOST_CLUSTERS} clusters, received {num_clusters}")
    return flash_table.support(dims, dtype, "gathering", flash_table.NARROW)
