"""What this machine is: everything that may explain why two runs differ. Imports no torch.

Whatever cannot be read is left out: a manifest never stops a run. Torch describes itself in a child, through
``measure.machine``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ctxbench import compiler

PACKAGES = (
    "ctxbench", "torch", "numpy", "msgspec", "sympy", "scipy", "pandas", "plotly", "matplotlib", "triton",
    "flash-attn", "flash-linear-attention", "xformers", "transformers", "nvidia-ml-py", "pynvml",
)  # fmt: skip
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY",
    "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME", "LD_PRELOAD", "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX", "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET",
    "THP_MEM_ALLOC_ENABLE", "CXX",
)  # fmt: skip


def fingerprint(root: Path = Path("/")) -> dict[str, Any]:
    """The machine and the software on it, section by section; the load is that of this moment."""
    sections = {
        "cpu": _cpu(root),
        "memory": _memory(root),
        "limits": _limits(root),
        "system": _system(root),
        "load": _load(root),
        "gpu": _gpus(),
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "packages": packages(PACKAGES),
        "compiler": _compiler(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git_state(Path(__file__).parent),
    }
    return {name: section for name, section in sections.items() if section}


def packages(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of a source checkout and whether it was changed; empty for an installed package."""
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return {}
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _cpu(root: Path) -> dict[str, Any]:
    fields = dict(_fields(root / "proc/cpuinfo"))
    first = root / "sys/devices/system/cpu/cpu0"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _present(
        {
            "model": fields.get("model name") or platform.processor() or platform.machine(),
            "cores_usable": usable,
            "cores": os.cpu_count(),
            "threads_per_core": _threads_per_core(first),
            "caches": dict(_caches(first)),
            "vector": [name for name in ("avx2", "avx512f", "amx_bf16", "asimd", "sve") if name in _flags(fields)],
            "hypervisor": "hypervisor" in _flags(fields),
            "governor": _line(first / "cpufreq/scaling_governor"),
            "boost": _line(root / "sys/devices/system/cpu/cpufreq/boost"),
            "no_turbo": _line(root / "sys/devices/system/cpu/intel_pstate/no_turbo"),
        }
    )


def _memory(root: Path) -> dict[str, Any]:
    fields = {name: value.split()[0] for name, value in _fields(root / "proc/meminfo") if value}
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    return _present(
        {
            "total_bytes": int(fields["MemTotal"]) * 1024 if "MemTotal" in fields else None,
            "available_bytes": int(fields["MemAvailable"]) * 1024 if "MemAvailable" in fields else None,
            "swap_bytes": int(fields["SwapTotal"]) * 1024 if "SwapTotal" in fields else None,
            "huge_pages": _chosen(_line(root / "sys/kernel/mm/transparent_hugepage/enabled")),
            "overcommit": _line(root / "proc/sys/vm/overcommit_memory"),
            "numa_nodes": len(nodes) or None,
        }
    )


def _limits(root: Path) -> dict[str, Any]:
    """What the control groups above this process allow, of either version."""
    own = [line.split(":", 2) for line in _lines(root / "proc/self/cgroup")]
    groups = {names: path for _, names, path in (entry for entry in own if len(entry) == 3)}
    base = root / "sys/fs/cgroup"
    unified = groups.get("", "/").lstrip("/")
    bound = groups.get("memory", "/").lstrip("/")
    limit = _line(base / unified / "memory.max") or _line(base / "memory" / bound / "memory.limit_in_bytes")
    return _present(
        {
            "memory_bytes": int(limit) if limit and limit.isdigit() and int(limit) < 2**60 else None,
            "cpu": _line(base / unified / "cpu.max"),
        }
    )


def _compiler() -> dict[str, str]:
    """What native kernels are made with; the flags are the same for all, those of this version."""
    words = compiler.command()
    return {"command": " ".join(words), "version": compiler.version(words)} if words else {}


def _system(root: Path) -> dict[str, Any]:
    return _present(
        {
            "system": platform.system(),
            "kernel": platform.release(),
            "distribution": _distribution(),
            "libc": " ".join(part for part in platform.libc_ver() if part),
            "hypervisor_product": _line(root / "sys/class/dmi/id/product_name"),
            "address_randomisation": _line(root / "proc/sys/kernel/randomize_va_space"),
            "container": (root / ".dockerenv").exists() or (root / "run/.containerenv").exists() or None,
        }
    )


def _load(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        found["average_1_5_15_min"] = list(os.getloadavg())
    for kind in ("cpu", "memory", "io"):
        line = _line(root / "proc/pressure" / kind)
        if line:
            found[f"pressure_{kind}"] = line
    return found


def _gpus() -> list[dict[str, Any]]:
    """Every NVIDIA device, as NVML describes it; empty without a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    questions = {
        "name": lambda: _text(pynvml.nvmlDeviceGetName(handle)),
        "memory_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        "driver": lambda: _text(pynvml.nvmlSystemGetDriverVersion()),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        "sm_clock_max_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "ecc": lambda: bool(pynvml.nvmlDeviceGetEccMode(handle)[0]),
    }
    found: dict[str, Any] = {"index": index}
    for name, question in questions.items():
        with contextlib.suppress(pynvml.NVMLError):
            found[name] = question()
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _caches(cpu: Path) -> Iterator[tuple[str, str]]:
    for index in sorted((cpu / "cache").glob("index[0-9]")):
        level, kind, size = (_line(index / name) for name in ("level", "type", "size"))
        if level and size:
            yield f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind or '', '') }", size


def _threads_per_core(cpu: Path) -> int | None:
    siblings = _line(cpu / "topology/thread_siblings_list")
    if not siblings:
        return None
    count = 0
    for part in siblings.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _flags(fields: dict[str, str]) -> set[str]:
    return set((fields.get("flags") or fields.get("Features") or "").split())


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _fields(path: Path) -> Iterator[tuple[str, str]]:
    """``name: value`` lines; of repeated names the last one counts."""
    for line in _lines(path):
        name, colon, value = line.partition(":")
        if colon:
            yield name.strip(), value.strip()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _line(path: Path) -> str | None:
    lines = _lines(path)
    return lines[0].strip() if lines else None


def _chosen(text: str | None) -> str | None:
    """``madvise`` of ``always [madvise] never``."""
    return text.partition("[")[2].partition("]")[0] or text if text else None


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value not in ({}, [], "")}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=5,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    import msgspec

    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(fingerprint())) + b"\n")
