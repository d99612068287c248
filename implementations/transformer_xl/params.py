"""Hyper-parameters of Transformer-XL."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flex_table, relative_table
from ctxbench.method import YES, Dims, Params, Support, no, param


@dataclass(frozen=True)
class TransformerXLParams(Params):
    """Segment and memory sizes in tokens, and the variants of the published code."""

    segment_len: int = param(
        512, "tokens of a segment; its queries share one memory", unit="tokens", low=1, source="enwik8 base"
    )
    mem_len: int = param(
        512, "tokens before a segment that it still sees; 0 is no memory", unit="tokens", low=0, source="enwik8 base"
    )
    same_length: bool = param(
        False, "every query sees exactly mem_len keys, itself included", source="enwik8 base: off in training"
    )
    clamp_len: int = param(
        0, "distances beyond this one count as this one; 0 is off", unit="tokens", low=0, source="enwik8 base"
    )
    start: str = param(
        "empty",
        "what the first segment finds: no memory, or mem_len zero vectors that it attends to",
        choices=("empty", "zeros"),
        source="authors' PyTorch code: empty; transformers' TransfoXL: zeros",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.same_length and not self.mem_len:
            raise ValueError("same_length needs mem_len of at least 1, received 0: a query would see no key")


def reach(dims: Dims, params: TransformerXLParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``: one staircase (or band) a layer.

    A set and not a range, which would promise gradients at its ends: memory passes values and no gradients.
    """
    lowest = i
    for _ in range(dims.num_layers):
        if params.same_length:
            lowest -= params.mem_len - 1
        else:
            lowest -= lowest % params.segment_len + params.mem_len
        lowest = max(lowest, 0)
    return frozenset(range(lowest, i + 1))


def triton_support(dims: Dims, params: TransformerXLParams, device: str, dtype: str) -> Support:
    """What the kernels of the relative term hold in registers; they take every variant of the method."""
    return relative_table.support(dims, dtype)


def flex_support(dims: Dims, params: TransformerXLParams, device: str, dtype: str) -> Support:
    """A staircase of whole tiles."""
    if params.same_length:
        return no("flex has block lists for whole segments of memory, not for same_length; triton has both")
    for what in ("segment_len", "mem_len"):
        answer = flex_table.whole_tiles(what, getattr(params, what))
        if not answer:
            return answer
    return flex_table.support(dims, params, device, dtype)


def sketch_support(dims: Dims, params: TransformerXLParams, device: str, dtype: str) -> Support:
    """The sketch has a memory and no variants of it."""
    if not params.mem_len:
        return no("the sketch cuts its memory with [:, -mem_len:], which keeps everything for mem_len = 0")
    if params.same_length or params.clamp_len or params.start != "empty":
        return no("the sketch has no same_length, no clamp_len and no zeros start")
    return YES
