"""Ceilings of this machine: measured once, kept in the user's cache folder, with a cautious stand-in until then."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from pathlib import Path

import msgspec

from ctxbench.cost.roofline import Ceilings

CORE_FLOPS_PER_S = {"fp32": 4.0e10, "bf16": 4.0e10, "fp64": 2.0e10}
CORE_BYTES_PER_S = 4.0e9
CUDA_FLOPS_PER_S = {"bf16": 1.0e14, "fp16": 1.0e14, "fp32": 1.5e13, "fp64": 5.0e12}
CUDA_BYTES_PER_S = 1.0e12


def usable_threads(threads: int) -> int:
    """The number asked for; 0 stands for every core this process may use."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def built_in(device: str, threads: int) -> Ceilings:
    """Ceilings most machines exceed, for forecasts before the first run."""
    if device.startswith("cuda"):
        return Ceilings(
            flops_per_s=CUDA_FLOPS_PER_S, bytes_per_s=CUDA_BYTES_PER_S, calibrated=False, device=device, threads=threads
        )
    cores = usable_threads(threads)
    flops_per_s = {dtype: value * cores for dtype, value in CORE_FLOPS_PER_S.items()}
    return Ceilings(
        flops_per_s=flops_per_s, bytes_per_s=CORE_BYTES_PER_S, calibrated=False, device=device, threads=cores
    )


def load(device: str, threads: int, torch_version: str) -> Ceilings:
    """Ceilings from the cache, the built-in ones where this machine was never calibrated."""
    with contextlib.suppress(OSError, RuntimeError, msgspec.MsgspecError):
        return msgspec.json.decode(_path(device, threads, torch_version).read_bytes(), type=Ceilings)
    return built_in(device, threads)


def save(ceilings: Ceilings, torch_version: str) -> bool:
    """Keep ceilings for the next run; False where the cache folder cannot be written, which costs only time."""
    path = _path(ceilings.device, ceilings.threads, torch_version)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(msgspec.json.encode(ceilings))
        partial.replace(path)
    except OSError:
        return False
    return True


def _path(device: str, threads: int, torch_version: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxbench"
    identity = "|".join((_processor(), platform.machine(), device, str(usable_threads(threads)), torch_version))
    return folder / f"ceilings-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}.json"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    with contextlib.suppress(OSError):
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"{platform.processor()} x{os.cpu_count()}"
