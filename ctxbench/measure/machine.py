"""Torch's view of the machine: its build, and the ceilings it reaches here. Needs torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SLICE_S = 0.06  # seconds a ceiling may take
SIZES = {"cpu": 1024, "cuda": 8192}  # side of the square matrices
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
DTYPES = {
    "cpu": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64},
    "cuda": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64},
}


def ceilings(device: str, slice_s: float = SLICE_S) -> tuple[dict[str, float], float]:
    """Matmul FLOP/s by dtype, and bytes read plus written by a copy each second; about 0.3 s on a CPU.

    The median of repeated calls: a ceiling that a neighbour's load allows, not a record.
    """
    kind = device.partition(":")[0]
    size, rates = SIZES[kind], {}
    for name, dtype in DTYPES[kind].items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * size**3 / median_s(lambda a=a, b=b: a @ b, device, slice_s)  # type: ignore[misc]
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source).zero_()
    return rates, 2 * COPY_BYTES[kind] / median_s(lambda: target.copy_(source), device, slice_s)


def torch_view(device: str) -> dict[str, Any]:
    """Version, build flags, threads and settings that change results or speed."""
    view: dict[str, Any] = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "build": torch.__config__.show(),
        "parallel": torch.__config__.parallel_info(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda_available": torch.cuda.is_available(),
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        view |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "device_l2_bytes": properties.L2_cache_size,
            "device_processors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        }
    return view


def median_s(call: Callable[[], Any], device: str, slice_s: float) -> float:
    """Median of ``times_s``."""
    return statistics.median(times_s(call, device, slice_s))


def times_s(call: Callable[[], Any], device: str, slice_s: float) -> list[float]:
    """Seconds of calls: at least three of them and for at least ``slice_s``, after one that is not counted."""
    settle = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    call()
    settle()
    times: list[float] = []
    while len(times) < 3 or sum(times) < slice_s:
        start = time.perf_counter()
        call()
        settle()
        times.append(time.perf_counter() - start)
    return times


def _nothing() -> None:
    """A CPU has finished when a call returns."""
