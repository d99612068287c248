"""Hyper-parameters of the segment-recurrent transformer, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table, graph_table
from ctxbench.method import Dims, Params, Support, param


@dataclass(frozen=True)
class SegmentRecurrentParams(Params):
    """The memory's size, how long a segment is, and how far a gradient goes."""

    memory_len: int = param(
        256,
        "items a layer remembers; a segment adds a quarter of that many, made of its last outputs",
        unit="tokens",
        low=1,
        source="source document, 256",
    )
    segment_len: int = param(512, "tokens of a segment", unit="tokens", low=1, source="source document, 512")
    bptt_depth: int = param(
        -1,
        "segment boundaries that a gradient passes at most; -1 is all of them, 0 leaves the gate untrained",
        unit="segments",
        low=-1,
        source="project; the source document never cuts, and its second training step fails",
    )

    @property
    def added(self) -> int:
        """Items that a whole segment adds: a quarter of the memory, rounded up, as far as the segment has them."""
        return min(-(-self.memory_len // 4), self.segment_len)


def reach(dims: Dims, params: SegmentRecurrentParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``: its segment up to itself, all earlier ones through the memory.

    A set and not a range, which would promise gradients at its ends: a call, or a cut, passes values alone.
    """
    return frozenset(range(i + 1))


def triton_support(dims: Dims, params: SegmentRecurrentParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers."""
    return flash_table.support(dims, dtype)


def diagonal_support(dims: Dims, params: SegmentRecurrentParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers, and heads of all layers that they take at once."""
    return flash_table.support_at_once(dims, dtype)


def graph_support(dims: Dims, params: SegmentRecurrentParams, device: str, dtype: str) -> Support:
    """Of the kernels, and of replays, which begin when the memory is full."""
    filled = -(-params.memory_len // params.added)
    return flash_table.support(dims, dtype) and graph_table.support(dims, params.segment_len, filled)
