"""What ``--impls auto`` means: a line of a method's table says which impl to take, and where. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

UNKNOWN = "its device's compute capability is unknown"


@dataclass(frozen=True)
class Pick:
    """One line of ``Method.picks``: the impl that ``auto`` takes where the line holds and the impl runs.

    Attributes:
        devices: device types, ``dtypes``, ``modes`` and ``causal``: where the line speaks; empty means everywhere.
        capability: least compute capability of a CUDA device, times ten: 90 is 9.0.
        sizes: closed intervals of sizes of ``Dims``, such as ``{"seq_len": (2048, inf), "head_dim": (1, 128)}``.
        why: a clause that says why this impl. ``measured``: it was seen on such a device, not only expected.
    """

    impl: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    causal: tuple[bool, ...] = ()
    capability: int = 0
    sizes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    why: str = ""
    measured: bool = False

    def speaks(self, mode: str, device_type: str, dtype: str, causal: bool) -> bool:
        """Whether the line is about such cells at all; what it says of their sizes and device is another matter."""
        chosen = ((self.devices, device_type), (self.dtypes, dtype), (self.modes, mode), (self.causal, causal))
        return all(not accepted or value in accepted for accepted, value in chosen)

    def objection(self, dims: Any, capability: int | None) -> str:
        """Why the line does not hold at these sizes or on this device; empty where it holds."""
        if self.capability and capability is None:
            return f"wants compute capability {self.capability / 10}, and {UNKNOWN}"
        if self.capability and capability is not None and capability < self.capability:
            return f"wants compute capability {self.capability / 10}, this device has {capability / 10}"
        for name, (low, high) in self.sizes.items():
            value = getattr(dims, name)
            if not low <= value <= high:
                return f"taken at a {name} {_bounds(low, high)}, received {value}"
        return ""

    @property
    def condition(self) -> str:
        """Where the line holds, in words: ``cuda from 9.0 on, bf16 or fp16, forward, seq_len from 2048 on``."""
        device = " or ".join(self.devices) + (f" from {self.capability / 10} on" if self.capability else "")
        parts = [device, " or ".join(self.dtypes), " or ".join(self.modes)]
        if len(self.causal) == 1:
            parts.append("causal" if self.causal[0] else "bidirectional")
        parts += [f"{name} {_bounds(low, high)}" for name, (low, high) in self.sizes.items()]
        return ", ".join(part for part in parts if part) or "everywhere"


class Choice(NamedTuple):
    """What ``auto`` came to: the impl, why, whether that was ever measured, and which lines were passed over and why.

    ``passed`` holds clauses such as ``flash_attn_4: needs the package flash-attn-4, which is not installed``.
    """

    impl: str
    why: str
    measured: bool
    passed: tuple[str, ...]


def _bounds(low: float, high: float) -> str:
    if high == inf:
        return f"from {low:g} on"
    return f"up to {high:g}" if low <= 1 else f"from {low:g} to {high:g}"
