"""Clock, temperature and power of an NVIDIA device through NVML (distribution ``nvidia-ml-py``)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

THROTTLED = 0.75  # of the device's default clock


@contextlib.contextmanager
def nvml(device: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield ``(pynvml, handle, "")``, or ``(None, None, reason)`` where NVML cannot be used.

    ``device`` counts what CUDA_VISIBLE_DEVICES shows, so the handle is found by the device's unique identifier.
    """
    try:
        import pynvml
    except ImportError:
        yield None, None, "the package nvidia-ml-py is not installed"
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield None, None, f"NVML: {error}"
        return
    try:
        try:
            handle, reason = _handle(pynvml, device), ""
        except pynvml.NVMLError as error:
            handle, reason = None, f"NVML: {error}"
        yield pynvml if handle is not None else None, handle, reason
    finally:
        pynvml.nvmlShutdown()


def snapshot(device: str) -> dict[str, Any]:
    """Clocks (MHz), temperature (degrees Celsius) and power (W) now; what cannot be read is None with a reason."""
    if not device.startswith("cuda"):
        return {}
    with nvml(device) as (library, handle, reason):
        if library is None:
            return {"telemetry": None, "telemetry_reason": reason}
        return {
            **_clocks(library, handle),
            "temperature_c": _ask(
                library, lambda: library.nvmlDeviceGetTemperature(handle, library.NVML_TEMPERATURE_GPU)
            ),
            "power_w": _ask(library, lambda: library.nvmlDeviceGetPowerUsage(handle) / 1000),
        }


@contextlib.contextmanager
def clock_watch(device: str) -> Iterator[Callable[[], bool]]:
    """Yield a question that is cheap to repeat: does the device run below three quarters of its default clock now?

    Where the clock cannot be read the answer is always no.
    """
    if not device.startswith("cuda"):
        yield lambda: False
        return
    with nvml(device) as (library, handle, _):
        yield (lambda: is_throttled(_clocks(library, handle))) if library is not None else (lambda: False)


def is_throttled(reading: dict[str, Any]) -> bool:
    """Whether the device runs below three quarters of its default clock."""
    clock, default = reading.get("sm_clock_mhz"), reading.get("default_clock_mhz")
    return bool(clock and default and clock < THROTTLED * default)


def _clocks(library: Any, handle: Any) -> dict[str, float | None]:
    """Clock of the multiprocessors now and by default, in MHz."""
    return {
        "sm_clock_mhz": _ask(library, lambda: library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)),
        "default_clock_mhz": _ask(
            library, lambda: library.nvmlDeviceGetDefaultApplicationsClock(handle, library.NVML_CLOCK_SM)
        ),
    }


def _handle(pynvml: Any, device: str) -> Any:
    import torch

    index = int(device.partition(":")[2] or 0)
    if torch.cuda.is_available():
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode())
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def _ask(library: Any, question: Any) -> float | None:
    """One figure, or None where this device does not offer it."""
    try:
        return float(question())
    except library.NVMLError:
        return None
