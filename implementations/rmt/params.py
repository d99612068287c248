"""Hyper-parameters of the recurrent memory transformer, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table, graph_table
from ctxbench.method import Dims, Params, Support, param


@dataclass(frozen=True)
class RMTParams(Params):
    """The memory's size, how long a segment is, what a memory token sees, and how far a gradient goes."""

    num_memory: int = param(
        10,
        "memory tokens, read at the start of a segment and written at its end",
        unit="tokens",
        low=1,
        source="Bulatov et al. 2022, 10",
    )
    segment_len: int = param(
        512, "ordinary tokens of a segment", unit="tokens", low=1, source="project; published 150 to 499"
    )
    variant: str = param(
        "hf",
        "hf: a plain causal model, memory tokens included; xl: memory tokens of one end see each other fully",
        choices=("hf", "xl"),
        source="the authors' two repositories: a wrapper of Hugging Face models, and LM-RMT on Transformer-XL",
    )
    bptt_depth: int = param(
        -1,
        "segment boundaries that a gradient passes at most; -1 is all of them",
        unit="segments",
        low=-1,
        source="Bulatov et al. 2022, 0 to 4; the wrapper of Hugging Face models never cuts",
    )


def reach(dims: Dims, params: RMTParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``: its segment up to itself, all earlier ones through the memory.

    A set and not a range, which would promise gradients at its ends: a call, or a cut, passes values alone.
    """
    return frozenset(range(i + 1))


def triton_support(dims: Dims, params: RMTParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers."""
    return flash_table.support(dims, dtype)


def graph_support(dims: Dims, params: RMTParams, device: str, dtype: str) -> Support:
    """Of the kernels, and of replays."""
    return flash_table.support(dims, dtype) and graph_table.support(dims, params.segment_len)
