"""Hyper-parameters of the memory bank, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table
from ctxbench.method import Dims, Params, Support, param


@dataclass(frozen=True)
class MemoryBankParams(Params):
    """The bank's size, how often it is written, and how a slot is chosen."""

    num_slots: int = param(1024, "slots of each layer's bank", unit="slots", low=1, source="source document, 1024")
    segment_len: int = param(
        512,
        "tokens between two writes, and the reach of self-attention",
        unit="tokens",
        low=1,
        source="project; the source document writes once a call",
    )
    write: str = param(
        "least_used",
        "which slot a write takes: the one written least often, or the arg-max of learned logits",
        choices=("least_used", "argmax"),
        source="project; the source document takes the arg-max",
    )


def triton_support(dims: Dims, params: MemoryBankParams, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers; segments are stacked into their batch."""
    stacked = dims.batch_size * -(-dims.seq_len // params.segment_len)
    return flash_table.support(dims.replace(batch_size=stacked), dtype)


def reach(dims: Dims, params: MemoryBankParams, i: int) -> range:
    """Input positions that may influence output ``i``: its segment up to itself, all earlier ones through the bank."""
    return range(i + 1)
