"""Peak bytes of one call by two independent meters: the allocator's events, and the resident high-water mark.

Both count what is above the parameters, the inputs and the incoming state. The resident meter only tells the truth in
a fresh process whose heap gives every block back (see ``run.client``), before any call of the same size was made.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxbench.measure import allocator

SLACK_BYTES, SLACK_SHARE = 2 * 2**20, 0.03
ONE_CALL_S = 0.1  # above this, both meters watch the same call
LONG_CALL_S = 2.0  # up to this, a call is made again where the record of the events may be what the meters differ by


@dataclass
class Peak:
    """What the meters saw; ``reason`` says why ``resident`` is absent."""

    allocated: int
    resident: int | None
    meter: str
    reason: str = ""


def agree(allocated: int | None, resident: int | None) -> bool | None:
    """Whether both meters give the same peak within max(2 MiB, 3 %); None where one of them is absent."""
    if allocated is None or resident is None:
        return None
    return abs(allocated - resident) <= max(SLACK_BYTES, SLACK_SHARE * allocated)


def measure(
    call: Callable[[], Any], device: str = "cpu", before: Callable[[], None] | None = None,
    expected_s: float | None = None,
) -> Peak:  # fmt: skip
    """Measure one call that has only been warmed up at small sizes.

    Args:
        call: its result is alive when the call ends, so the output is part of the peak.
        device: ``cpu`` or a CUDA device.
        before: puts the state back that a call starts from (drops gradients).
        expected_s: forecast of the call; all but short ones are made once, under both meters.
    """
    ready = before or _nothing
    ready()
    if device.startswith("cuda"):
        return _cuda(call, device)
    if expected_s is not None and expected_s > ONE_CALL_S:
        marks: list[tuple[int | None, str]] = []
        _settle()
        # The mark is read before the record of the events is, which takes as much again.
        allocated, meter = allocator.measure(lambda: marks.append(high_water(call)))
        resident, reason = marks[0]
        if resident is not None:
            if resident > allocated and not agree(allocated, resident) and expected_s <= LONG_CALL_S:
                ready()
                resident, reason = high_water(call)
            return Peak(allocated, resident, meter, reason)
    else:
        resident, reason = high_water(call)
    ready()
    allocated, meter = allocator.measure(call)
    return Peak(allocated, resident, meter, reason)


def high_water(call: Callable[[], Any], proc: Path = Path("/proc/self")) -> tuple[int | None, str]:
    """Growth of the resident set's high-water mark during a call, or None with the reason."""
    _settle()
    try:
        (proc / "clear_refs").write_text("5")  # the mark falls to what is resident now
        start = _status(proc, "VmRSS")
    except OSError as error:
        return None, f"this kernel does not let the high-water mark be reset ({error.strerror})"
    result = call()
    peak = _status(proc, "VmHWM")
    del result
    return max(peak - start, 0), ""


def _cuda(call: Callable[[], Any], device: str) -> Peak:
    """The caching allocator's own peaks: allocated, and reserved as the witness."""
    import torch

    call()  # workspaces of the libraries are taken once
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = Peak(
        torch.cuda.max_memory_allocated(device) - allocated, torch.cuda.max_memory_reserved(device) - reserved,
        "CUDA allocator (resident: reserved)",
    )  # fmt: skip
    del result
    return peak


def _status(proc: Path, field: str) -> int:
    for line in (proc / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(0, f"no {field} in {proc / 'status'}")


def _settle() -> None:
    """Collect what nobody holds and hand freed memory back."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library keeps its own pages
        ctypes.CDLL(None).malloc_trim(0)


def _nothing() -> None:
    """Leave everything as it is."""
