"""Hyper-parameters of shifted sparse attention, and who may influence whom. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ctxbench.implementations._shared import flash_table, flex_table
from ctxbench.method import YES, Dims, Params, Support, no, param


@dataclass(frozen=True)
class LongLoRAParams(Params):
    """The group: a part of the sequence, or a number of tokens; and what the shift does with the ends."""

    group: int = param(
        0,
        "tokens of a group, an even number; 0 takes group_fraction of the sequence",
        unit="tokens",
        low=0,
        source="released script: 8192 where the sequence is no multiple of 4096",
    )
    group_fraction: float = param(
        0.25,
        "group over sequence where group = 0, rounded up to an even number",
        unit="of the sequence",
        low=0.001,
        high=1,
        source="paper, 1/4",
    )
    wrap: bool = param(
        False,
        "shift in a circle, so that the first tokens of half of the heads see the last ones",
        source="off: the released fused path; on: the paper's pseudo-code",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group % 2:
            raise ValueError(f"group must be even, since half of the heads shift by half of it, received {self.group}")


def exact_fraction(params: LongLoRAParams) -> Fraction:
    """``group_fraction`` as the fraction that was meant: 0.1 is 1/10."""
    return Fraction(params.group_fraction).limit_denominator(1000)


def group_size(tokens: int, params: LongLoRAParams) -> int:
    """Tokens of a group in a sequence of ``tokens``."""
    return params.group or 2 * math.ceil(tokens * exact_fraction(params) / 2)


def support(dims: Dims, params: LongLoRAParams, mode: str) -> Support:
    """Groups are causal, and only a circular shift breaks that: the direction has to be asked for by its name."""
    if params.wrap and dims.causal:
        return no("with wrap the first tokens of half of the heads see the last ones: it runs only as causal=False")
    if not params.wrap and not dims.causal:
        return no("groups are causal; the one form that sees later tokens is wrap=True")
    return YES


def triton_support(dims: Dims, params: LongLoRAParams, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers."""
    return flash_table.support(dims, dtype)


def flex_support(dims: Dims, params: LongLoRAParams, device: str, dtype: str) -> Support:
    """Groups and their halves of whole tiles."""
    half = group_size(dims.seq_len, params) // 2
    answer = flex_table.whole_tiles("half a group", half)
    return flex_table.support(dims, params, device, dtype) if answer else answer


def reach(dims: Dims, params: LongLoRAParams, i: int) -> range | set[int]:
    """Input positions that may influence output ``i``: a group and a shifted group a layer."""
    T, G = dims.seq_len, group_size(dims.seq_len, params)
    shift = G // 2 if dims.num_heads > 1 else 0  # one head is not shifted
    if not params.wrap:
        lowest = i
        for _ in range(dims.num_layers):
            lowest = min(lowest // G * G, max(0, (lowest + shift) // G * G - shift))
        return range(lowest, i + 1)
    last = math.ceil(T / G) * G - shift  # where the group that the circle closes begins
    seen = {i}
    for _ in range(dims.num_layers):
        for token in tuple(seen):
            seen |= {*range(token // G * G, token + 1), *range(max(0, (token + shift) // G * G - shift), token + 1)}
            if token < shift:
                seen |= set(range(last, T))
    return seen
