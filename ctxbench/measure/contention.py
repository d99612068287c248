"""Did other work disturb a measurement? Sensors the kernel offers to everyone, read before and after."""

from __future__ import annotations

import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DELAY_SHARE = 0.10  # of the time threads wanted to run, the part they waited for a core
PRESSURE = 0.20  # of the measurement, the part in which some task of the machine waited for a core


@dataclass(frozen=True)
class Reading:
    """State of the sensors at one moment; None where the kernel does not offer one."""

    at: float
    run_ns: int | None
    delay_ns: int | None
    pressure: dict[str, float | None]  # avg10 of cpu and memory, per cent
    stalled_us: dict[str, int | None]  # total stall time of cpu and memory
    involuntary: int
    faults: int


def read(proc: Path = Path("/proc")) -> Reading:
    """Read every sensor once; takes well under a millisecond."""
    run, delay = _run_queue(proc)
    stalls = {kind: _stall(proc / "pressure" / kind) for kind in ("cpu", "memory")}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Reading(
        at=time.monotonic(),
        run_ns=run,
        delay_ns=delay,
        pressure={kind: average for kind, (average, _) in stalls.items()},
        stalled_us={kind: total for kind, (_, total) in stalls.items()},
        involuntary=usage.ru_nivcsw,
        faults=usage.ru_minflt,
    )


def between(before: Reading, after: Reading) -> tuple[dict[str, Any], bool]:
    """What happened between two readings, and whether that makes the measurement *contended*.

    Sensors that are absent appear as None, with the reason beside them.
    """
    elapsed = max(after.at - before.at, 1e-9)
    sensors: dict[str, Any] = {
        "involuntary_switches": after.involuntary - before.involuntary,
        "minor_faults": after.faults - before.faults,
    }
    if after.delay_ns is None or before.delay_ns is None or after.run_ns is None or before.run_ns is None:
        sensors |= {"delay_share": None, "delay_share_reason": "the kernel offers no schedstat"}
    else:
        ran, waited = after.run_ns - before.run_ns, after.delay_ns - before.delay_ns
        sensors["delay_share"] = waited / (ran + waited) if ran + waited > 0 else 0.0
    for kind in ("cpu", "memory"):
        first, last = before.stalled_us[kind], after.stalled_us[kind]
        sensors[f"psi_{kind}_avg10"] = after.pressure[kind]
        if first is None or last is None:
            sensors |= {f"psi_{kind}_share": None, f"psi_{kind}_reason": f"the kernel offers no /proc/pressure/{kind}"}
        else:
            sensors[f"psi_{kind}_share"] = (last - first) * 1e-6 / elapsed
    # The kernel's average of ten seconds still holds what ended before the measurement began, and is for people.
    contended = (sensors["delay_share"] or 0.0) > DELAY_SHARE or (sensors["psi_cpu_share"] or 0.0) > PRESSURE
    return sensors, contended


def _run_queue(proc: Path) -> tuple[int | None, int | None]:
    """Nanoseconds that all threads of this process ran, and waited to run."""
    run = delay = 0
    try:
        for thread in (proc / "self" / "task").iterdir():
            ran, waited, _ = (thread / "schedstat").read_text().split()
            run, delay = run + int(ran), delay + int(waited)
    except (OSError, ValueError):
        return None, None
    return run, delay


def _stall(path: Path) -> tuple[float | None, int | None]:
    try:
        found = re.search(r"some avg10=([\d.]+).*total=(\d+)", path.read_text())
    except OSError:  # absent, or switched off at boot
        return None, None
    return (float(found[1]), int(found[2])) if found else (None, None)
