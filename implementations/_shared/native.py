"""C++ kernels for the CPU: compiled once on a machine, for its own instructions, and called without a copy.

For what PyTorch's operators could only do in several passes over memory. A kernel is one source file with plain C
functions, ``name_float32(pointer, ...)`` and so on, and may include the headers beside this file; it uses OpenMP, whose
library PyTorch brings and has loaded, so that its threads are PyTorch's own. ``native_build`` says what is kept.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctxbench.implementations._shared import native_build


def function(source: Path, name: str, dtype: torch.dtype, *arguments: Any) -> Any:
    """The C function ``<name>_<dtype>`` of a source file; ``arguments`` are its types, of :mod:`ctypes`.

    Raises:
        RuntimeError: there is no compiler, or it refuses the source, or what it made cannot be kept or loaded.
    """
    found = getattr(_library(source), f"{name}_{str(dtype).removeprefix('torch.')}")
    found.argtypes, found.restype = arguments, None
    return found


def integers(numbers: Sequence[int]) -> Any:
    """An array of 64-bit integers, as C functions take sizes and strides."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def _library(source: Path) -> ctypes.CDLL:
    path = native_build.library(source)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(
            f"a native kernel cannot be loaded: {error}\n"
            f"  received the cache folder {path.parent}\n"
            "  accepted: one that programs may be run from; let XDG_CACHE_HOME name it"
        ) from None
