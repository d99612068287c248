"""Hyper-parameters of the Compressive Transformer."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import native_table, relative_table
from ctxbench.method import YES, Dims, Params, Support, no, param

TRAINED = ("conv", "dilated_conv")  # compressions that have weights
DILATIONS = (1, 2)  # of dilated_conv, before the convolution that compresses
KERNEL = 3  # of its dilated layers


@dataclass(frozen=True)
class CompressiveTransformerParams(Params):
    """Sizes in tokens and entries, and the published choices of compression and its training."""

    segment_len: int = param(
        512, "tokens of a segment; its queries share one memory", unit="tokens", low=1, source="PG-19 model"
    )
    mem_len: int = param(
        512, "tokens before a segment that it sees as they are", unit="tokens", low=0, source="PG-19 model"
    )
    compressed_len: int = param(
        512, "compressed entries it sees of what came before these; 0 is none", unit="entries", low=0,
        source="PG-19 model",
    )  # fmt: skip
    rate: int = param(2, "tokens that become one entry", unit="tokens", low=1, source="PG-19 model")
    compression: str = param(
        "conv", "how tokens become entries", choices=("max", "mean", *TRAINED, "most_used"), source="section 3.2"
    )
    auxiliary: str = param(
        "attention_reconstruction", "loss that trains a compression with weights, added to the backward pass",
        choices=("attention_reconstruction", "auto_encoding", "none"), source="section 3.2",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("segment_len", "mem_len"):
            if getattr(self, name) % self.rate:
                raise ValueError(f"{name} must be a multiple of rate, received {getattr(self, name)} and {self.rate}")

    @property
    def trained(self) -> bool:
        """Whether there are compression weights; outputs give them no gradient, the auxiliary loss does."""
        return self.compressed_len > 0 and self.compression in TRAINED


def reach(dims: Dims, params: CompressiveTransformerParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``.

    A set and not a range, which would promise gradients at its ends: memories pass values and no gradients.
    """
    if params.compression == "most_used" and params.compressed_len:  # every earlier query had a say in what is kept
        return frozenset(range(i + 1))
    lowest = i
    for _ in range(dims.num_layers):
        lowest = max(0, _oldest(params, lowest - lowest % params.segment_len))
    return frozenset(range(lowest, i + 1))


def _oldest(params: CompressiveTransformerParams, begin: int) -> int:
    """First token that the segment beginning at ``begin`` sees, in an entry or as it is."""
    memory = begin - params.mem_len
    entries = min(params.compressed_len, max(0, memory) // params.rate)
    first = memory - entries * params.rate
    if params.compression == "dilated_conv" and entries:
        # Its layers look sideways, but not beyond the tokens that left the memory together.
        together = memory - -(-(memory - first) // params.segment_len) * params.segment_len
        first = max(together, first - sum(DILATIONS) * (KERNEL // 2))
    return first


def blocked_support(dims: Dims, params: CompressiveTransformerParams, device: str, dtype: str) -> Support:
    """All but most_used can be computed for all segments at once."""
    if params.compression == "most_used" and params.compressed_len:
        return no("most_used keeps what earlier segments attended to, so segments can only follow one another")
    return YES


def native_support(dims: Dims, params: CompressiveTransformerParams, device: str, dtype: str) -> Support:
    """What all segments at once allow, where there is a compiler."""
    at_once = blocked_support(dims, params, device, dtype)
    return native_table.wide_support(dims, params, device, dtype) if at_once else at_once


def triton_support(dims: Dims, params: CompressiveTransformerParams, device: str, dtype: str) -> Support:
    """What all segments at once allow, and what the kernels of the relative term hold in registers."""
    at_once = blocked_support(dims, params, device, dtype)
    return relative_table.support(dims, dtype) if at_once else at_once
