"""Hyper-parameters of the Memorizing Transformer, and who may influence whom. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table
from ctxbench.method import Dims, Params, Support, no, param

MOST_PICKED = 128  # pairs a query can hold in registers while it searches
FROM_TOP = 4  # the layer with the memory, counted from the top; in shallower stacks the lowest layer


@dataclass(frozen=True)
class MemorizingParams(Params):
    """Sizes in tokens, and how the memory is looked up."""

    memory_len: int = param(
        8192, "past key-value pairs a head of the memory layer keeps; 0 is no memory", unit="tokens", low=0,
        source="Wu et al. 2022, 4",
    )  # fmt: skip
    lookup: str = param(
        "topk",
        "what a query attends to in the memory: its top_k best keys, exactly, or all of them",
        choices=("topk", "dense"),
        source="Wu et al. 2022, 3.2; dense: the successor in the authors' repository",
    )
    top_k: int = param(32, "pairs a query retrieves (lookup = topk)", unit="tokens", low=1, source="Wu et al. 2022, 4")
    window: int = param(
        512, "keys a token sees locally, itself included", unit="tokens", low=1, source="authors' configuration"
    )
    segment_len: int = param(
        512, "tokens between two writes of the memory", unit="tokens", low=1, source="Wu et al. 2022, 4"
    )

    @property
    def retrieved(self) -> int:
        """Most memory pairs that a query attends to."""
        return min(self.top_k, self.memory_len) if self.lookup == "topk" else self.memory_len


def triton_support(dims: Dims, params: MemorizingParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers."""
    if params.lookup == "topk" and params.top_k < params.memory_len:
        if params.top_k > MOST_PICKED:
            return no(f"the search holds at most {MOST_PICKED} pairs a query, received top_k = {params.top_k}")
        return flash_table.support(dims, dtype, "search", flash_table.NARROW)
    return flash_table.support(dims, dtype)


def memory_layer(num_layers: int) -> int:
    """Index of the layer with the memory."""
    return max(0, num_layers - FROM_TOP)


def reach(dims: Dims, params: MemorizingParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``: a window a layer, and the memory in one of them.

    A set and not a range, which would promise gradients at its ends: memory passes values and no gradients.
    """
    reached = {i}
    for layer in reversed(range(dims.num_layers)):
        seen = {j for token in reached for j in range(max(0, token - params.window + 1), token + 1)}
        if layer == memory_layer(dims.num_layers):
            for start in {token - token % params.segment_len for token in reached}:
                seen.update(range(max(0, start - params.memory_len), start))
        reached = seen
    return frozenset(reached)
