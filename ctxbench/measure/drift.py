"""Is the machine as fast at the end of a process as at its start? A pair of reference kernels tells. Needs torch.

Where clocks and counters cannot be read, as on most virtual machines, this is the only witness of a change of speed.
The times stand in the row, so that results of two days or two machines can also be read in units of the reference.
On a CPU the product is also timed between the samples: on a shared host the speed changes within a second, and what
the samples share with the products beside them is not the program's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ctxbench.measure.machine import times_s

# Relative change beyond which a process is marked. Best times of products repeat within a few per cent on a quiet
# machine; the bandwidth of copies is shared with neighbours, and varies by a quarter on a virtual one.
MATMUL_LIMIT, COPY_LIMIT = 0.05, 0.30
MATMUL_SLICE_S, COPY_SLICE_S = 0.015, 0.005  # each time: hundreds of processes must not pay more than seconds
SIDE = {"cpu": 512, "cuda": 4096}  # of the square fp32 matrices
COPY_BYTES = {"cpu": 2**23, "cuda": 2**28}


@dataclass(frozen=True)
class Pair:
    """Best seconds of a matrix product, bound by arithmetic, and of a copy, bound by memory."""

    matmul_s: float
    copy_s: float


def reference_pair(device: str) -> Pair:
    """Time both kernels here and now, with the threads of the process; about 25 ms."""
    kind = device.partition(":")[0]
    a = torch.ones(SIDE[kind], SIDE[kind], device=device)
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    return Pair(
        min(times_s(lambda: a @ a, device, MATMUL_SLICE_S)),
        min(times_s(lambda: target.copy_(source), device, COPY_SLICE_S)),
    )


def beat(device: str) -> Callable[[], float] | None:
    """One product of the reference kernel, timed; None for a GPU, whose clock can be read and whose launches queue."""
    if device != "cpu":
        return None
    a = torch.ones(SIDE["cpu"], SIDE["cpu"])
    product = torch.empty_like(a)

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(a, a, out=product)
        return time.perf_counter() - start

    seconds()
    return seconds


def between(before: Pair, after: Pair) -> dict[str, Any]:
    """Both times of both kernels, and ``drift``: their relative changes beyond the limits, with sign, by kernel."""
    changes = {
        "products": (after.matmul_s / before.matmul_s - 1, MATMUL_LIMIT),
        "copies": (after.copy_s / before.copy_s - 1, COPY_LIMIT),
    }
    return {
        "reference_matmul_s": [before.matmul_s, after.matmul_s],
        "reference_copy_s": [before.copy_s, after.copy_s],
        "drift": {kernel: change for kernel, (change, limit) in changes.items() if abs(change) > limit},
    }
