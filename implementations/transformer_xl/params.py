"""Hyper-parameters of Transformer-XL."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.method import Params, param


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
