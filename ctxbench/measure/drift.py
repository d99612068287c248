"""Is the machine as fast at the end of a process as at its start? A pair of reference kernels tells. Needs torch.

Where clocks and counters cannot be read, as on most virtual machines, this is the only witness of a change of speed.
The times stand in the row, so that results of two days or two machines can also be read in units of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ctxbench.measure.machine import median_s

LIMIT = 0.05  # relative change of either kernel beyond which a process is marked
SLICE_S = 0.005  # of each kernel, each time: three hundred cells of three processes must not pay more than seconds
SIDE = {"cpu": 256, "cuda": 4096}  # of the square fp32 matrices
COPY_BYTES = {"cpu": 2**23, "cuda": 2**28}


@dataclass(frozen=True)
class Pair:
    """Seconds of one matrix product, bound by arithmetic, and of one copy, bound by memory."""

    matmul_s: float
    copy_s: float


def reference_pair(device: str) -> Pair:
    """Time both kernels here and now, with the threads of the process; about 10 ms."""
    kind = device.partition(":")[0]
    a = torch.ones(SIDE[kind], SIDE[kind], device=device)
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    return Pair(
        median_s(lambda: a @ a, device, SLICE_S),
        median_s(lambda: target.copy_(source), device, SLICE_S),
    )


def between(before: Pair, after: Pair) -> dict[str, Any]:
    """Both times of both kernels, and ``drift``: the larger relative change of the two, with its sign."""
    changes = (after.matmul_s / before.matmul_s - 1, after.copy_s / before.copy_s - 1)
    return {
        "reference_matmul_s": [before.matmul_s, after.matmul_s],
        "reference_copy_s": [before.copy_s, after.copy_s],
        "drift": max(changes, key=abs),
    }
