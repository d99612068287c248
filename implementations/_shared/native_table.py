"""Where C++ kernels can be made, for planning too: no torch here."""

from __future__ import annotations

import os
import sys

from ctxbench.implementations._shared import native_build
from ctxbench.method import YES, Dims, Impl, Params, Support, no

NOTE = "kernels of our own in C++, compiled on this machine; scores never leave the innermost cache"
FORWARD, TRAINED = ("forward", "stream"), ("forward", "train", "stream")  # modes
PAD = 16  # numbers that a row of ``tiles.hpp`` is a multiple of
WITHOUT = {
    "train": "its kernels have no backward pass; blocked trains",
    "stream": "they take a whole sequence and no state; blocked streams",
    "decode": "one query leaves no scores to keep in a cache, so they gain nothing; blocked decodes",
}


def padded(count: int) -> int:
    """The next multiple of PAD."""
    return -(-count // PAD) * PAD


def support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """A compiler that makes them, and a system that loads what it makes beside PyTorch's own threads."""
    if not sys.platform.startswith("linux"):
        return no(f"native kernels share the threads of PyTorch's build for Linux, received {sys.platform}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return no("Triton's interpreter takes the tensors of native kernels: unset TRITON_INTERPRET")
    refusal = native_build.refusal()
    return no(refusal) if refusal else YES


def wide_support(dims: Dims, params: Params, device: str, dtype: str) -> Support:
    """The same for kernels whose products are those of ``tiles.hpp``."""
    if dtype == "bf16":
        return no("this native kernel multiplies in fp32 and fp64; in bf16 blocked uses units of their own")
    return support(dims, params, device, dtype)


def native_impl(
    run: str, positions: tuple[str, ...] = (), note: str = NOTE, modes: tuple[str, ...] = FORWARD,
    support: str = f"{__name__}:support", counts_as: str = "triton",
) -> Impl:  # fmt: skip
    """The impl of a method, by default of one whose Triton kernels are those of ``ranges``; fp64 is to be compared."""
    return Impl(
        "native", run=run, devices=("cpu",), dtypes=("fp32", "bf16", "fp64"), modes=modes, without=WITHOUT,
        positions=positions, support=support, counts_as=counts_as, note=note,
    )  # fmt: skip
