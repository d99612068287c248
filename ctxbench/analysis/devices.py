"""Machines a forecast may be asked for although they are not here: peaks and memory by the vendor's datasheet.

Dense rates without sparsity, fp32 without tensor cores (torch's default), bandwidth read plus write. Sources: NVIDIA
A100 80GB (SXM), H100 (SXM) and H200 (SXM) datasheets. Capacities count decimal gigabytes, which is less than what
these devices report, so that "fits" errs on the safe side.
"""

from __future__ import annotations

import msgspec

from ctxbench.cost.roofline import Ceilings


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device: its title, FLOP/s by dtype, bytes/s, bytes of memory, and compute capability times ten."""

    title: str
    flops_per_s: dict[str, float]
    bytes_per_s: float
    memory_bytes: int
    capability: int

    @property
    def ceilings(self) -> Ceilings:
        """The peaks as the roofline takes them: no program exceeds them, so they bound like measured ones."""
        return Ceilings(
            flops_per_s=self.flops_per_s, bytes_per_s=self.bytes_per_s, calibrated=True, device="cuda"
        )  # fmt: skip


_HOPPER = {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12, "fp64": 67e12}

DEVICES = {
    "a100": Device(
        title="NVIDIA A100 80GB", bytes_per_s=2.039e12, memory_bytes=80 * 10**9, capability=80,
        flops_per_s={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12, "fp64": 19.5e12},
    ),
    "h100": Device(
        title="NVIDIA H100 SXM", bytes_per_s=3.35e12, memory_bytes=80 * 10**9, capability=90, flops_per_s=_HOPPER,
    ),
    "h200": Device(
        title="NVIDIA H200 SXM", bytes_per_s=4.8e12, memory_bytes=141 * 10**9, capability=90, flops_per_s=_HOPPER,
    ),
}  # fmt: skip
