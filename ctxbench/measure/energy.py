"""Joules a call, from a counter of the hardware or not at all: a modelled watt is never shown as a measured one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ctxbench.measure import telemetry

WINDOW_S = 2.0  # at least twenty updates of a counter that moves about every 0.1 s
RAPL = Path("/sys/class/powercap")


class Counter(Protocol):
    """A running total of joules."""

    def joules(self, since: Any = None) -> Any:
        """The reading now, or the joules since an earlier reading."""


class Rapl:
    """Package energy of the processor; the counters wrap at ``max_energy_range_uj``."""

    def __init__(self, folders: list[Path]):
        self.folders = folders
        self.ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in folders]

    def joules(self, since: list[int] | None = None) -> Any:
        now = [int((folder / "energy_uj").read_text()) for folder in self.folders]
        if since is None:
            return now
        spent = ((last - first) % (limit + 1) for first, last, limit in zip(since, now, self.ranges, strict=True))
        return sum(spent) * 1e-6


class Nvml:
    """Total energy of one device since the driver was loaded, in millijoules (Volta and later)."""

    def __init__(self, device: str):
        self.device = device

    def joules(self, since: float | None = None) -> float:
        with telemetry.nvml(self.device) as (library, handle, reason):
            if library is None:
                raise OSError(reason)
            try:
                now = library.nvmlDeviceGetTotalEnergyConsumption(handle) * 1e-3
            except library.NVMLError as error:
                raise OSError(f"NVML: {error}") from error
        return float(now if since is None else now - since)


def counter_for(device: str, rapl: Path = RAPL) -> tuple[Counter | None, str]:
    """The energy counter of a device, or None with the reason."""
    counter: Counter
    if device.startswith("cuda"):
        counter = Nvml(device)
    else:
        folders = sorted(rapl.glob("intel-rapl:?")) if rapl.is_dir() else []
        if not folders:
            return None, "this machine has no energy counter (RAPL)"
        try:
            counter = Rapl(folders)
        except OSError:
            return None, "the energy counter (RAPL) exists but may not be read by this user"
    try:
        counter.joules()
    except OSError as error:
        return None, f"the energy counter cannot be read: {error}"
    return counter, ""


def measure(
    call: Callable[[], Any], counter: Counter, settle: Callable[[], None], clock: Callable[[], float] = time.monotonic
) -> float:
    """Joules a call: call again and again for two seconds between two readings of the counter.

    Args:
        call: what is measured, already warm.
        counter: where joules are read.
        settle: waits until the device has finished.
        clock: monotonic seconds.
    """
    settle()
    start, before, count = clock(), counter.joules(), 0
    while count == 0 or clock() - start < WINDOW_S:
        call()
        count += 1
        settle()
    return float(counter.joules(before)) / count
