"""C++ kernels for the CPU: compiled once on a machine, for its own instructions, and called without a copy.

For what PyTorch's operators could only do in several passes over memory. A kernel is one source file with plain C
functions, ``name_float32(pointer, ...)`` and so on, and may include the headers beside this file; it uses OpenMP, whose
library PyTorch brings and has loaded, so that its threads are PyTorch's own. What was compiled is kept under a name
that holds the source, the headers, the compiler and the machine's instructions, so nothing stale is ever loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxbench.implementations._shared.native_table import compiler

FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math",
)  # fmt: skip
"""Sums in any order, but infinities and NaN keep their meaning."""


def function(source: Path, name: str, dtype: torch.dtype, *arguments: Any) -> Any:
    """The C function ``<name>_<dtype>`` of a source file; ``arguments`` are its types, of :mod:`ctypes`.

    Raises:
        RuntimeError: there is no compiler, or it refuses the source; its own words are in the message.
    """
    found = getattr(_library(source), f"{name}_{str(dtype).removeprefix('torch.')}")
    found.argtypes, found.restype = arguments, None
    return found


def integers(numbers: Sequence[int]) -> Any:
    """An array of 64-bit integers, as C functions take sizes and strides."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def _library(source: Path) -> ctypes.CDLL:
    """The source compiled, from the cache where it was compiled before."""
    command = compiler()
    if command is None:
        raise RuntimeError("native kernels need a C++ compiler: install g++ or let CXX name one")
    shared = sorted(Path(__file__).parent.glob("*.hpp"))
    text = "".join(path.read_text() for path in (source, *shared))
    key = hashlib.sha256("\0".join((text, command, *FLAGS, _instructions())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctxbench" / "native"
    kept = folder / f"{source.stem}-{key}.so"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # several processes may compile at once
            target = Path(made) / kept.name
            done = subprocess.run(
                [command, *FLAGS, f"-I{Path(__file__).parent}", str(source), "-o", str(target)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{command} could not compile {source.name}:\n{done.stderr.strip()[-2000:]}")
            target.replace(kept)
    return ctypes.CDLL(str(kept))


def _instructions() -> str:
    """What tells apart machines that need other code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
