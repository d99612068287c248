"""Hyper-parameters of Longformer, and the attention patterns they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table, flex_table
from ctxbench.implementations._shared.window import Pattern
from ctxbench.method import YES, Dims, Params, Support, no, param


@dataclass(frozen=True)
class LongformerParams(Params):
    """One layer's attention pattern; the same in every layer. Heads differ in dilation alone."""

    window: int = param(
        512,
        "causal: keys a token sees, itself included; bidirectional: window // 2 keys on each side and itself",
        unit="tokens",
        low=1,
        source="Beltagy et al. 2020, 4.2",
    )
    num_global: int = param(16, "prefix tokens that see all tokens and that all tokens see", unit="tokens", low=0)
    scattered: str = param("", "positions of further global tokens, joined by +, as in 100+2000")
    dilation: int = param(1, "distance between neighbouring keys of the window", unit="tokens", low=1)
    dilated_heads: int = param(
        0,
        "so many heads, the last ones, are dilated; 0: all",
        unit="heads",
        low=0,
        source="Beltagy et al. 2020, 4.2: 2",
    )
    separate_global: bool = param(
        True, "global tokens have query, key and value projections of their own", source="Beltagy et al. 2020, 3.1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(part.isascii() and part.isdigit() for part in self.scattered.split("+") if self.scattered):
            raise ValueError(f"scattered must be positions joined by +, as in 100+2000, received {self.scattered!r}")

    @property
    def positions(self) -> tuple[int, ...]:
        """Global tokens outside the prefix, ascending."""
        named = {int(part) for part in self.scattered.split("+") if part}
        return tuple(sorted(position for position in named if position >= self.num_global))

    def pattern(self, causal: bool, dilated: bool = True) -> Pattern:
        """The pattern of the dilated heads, or of the others, in one direction of attention."""
        left, right = (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)
        return Pattern(left, right, self.dilation if dilated else 1, self.num_global, causal, self.positions)

    def groups(self, dims: Dims) -> tuple[tuple[slice, Pattern], ...]:
        """Heads of one pattern each: the undilated first."""
        plain = dims.num_heads - self.dilated_heads if self.dilated_heads and self.dilation > 1 else 0
        parts = [(slice(plain), self.pattern(dims.causal, dilated=False))] if plain else []
        return (*parts, (slice(plain, dims.num_heads), self.pattern(dims.causal)))


def support(dims: Dims, params: LongformerParams, mode: str) -> Support:
    """State is of use only when later tokens cannot change earlier outputs."""
    if params.dilated_heads > dims.num_heads:
        return no(f"dilated_heads must be at most num_heads = {dims.num_heads}, received {params.dilated_heads}")
    if dims.position in ("t5", "alibi") and (params.num_global or params.positions):
        return no(
            f"{dims.position} is for the window alone, since what global tokens add at any distance is not defined: "
            "choose num_global=0"
        )
    if mode in ("stream", "decode") and not dims.causal:
        return no("a bidirectional layer cannot be continued: a token sees window // 2 later tokens, a global one all")
    return YES


def reach(dims: Dims, params: LongformerParams, i: int) -> set[int]:
    """Input positions that may influence output ``i``: what it sees, and what that has seen in the layers below."""
    patterns, reached = [pattern for _, pattern in params.groups(dims)], {i}
    for _ in range(dims.num_layers):
        seen = (pattern.sees(j, dims.seq_len) for pattern in patterns for j in reached)
        reached = reached.union(*seen)
    return reached


def triton_support(dims: Dims, params: LongformerParams, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers."""
    return flash_table.support(dims, dtype)


def flex_support(dims: Dims, params: LongformerParams, device: str, dtype: str) -> Support:
    """One band and a prefix; a tile of a dilated band would be kept for one key in ``dilation``."""
    if params.dilation > 1 or params.positions:
        what = f"dilation={params.dilation}" if params.dilation > 1 else f"scattered={params.scattered}"
        return no(f"flex has block lists for a window and a prefix, received {what}; triton has the others")
    return flex_table.support(dims, params, device, dtype)


def sketch_support(dims: Dims, params: LongformerParams, device: str, dtype: str) -> Support:
    """The sketch has no dilation; of its list of global positions only the default, a prefix, is rebuilt."""
    if params.dilation > 1:
        return no(f"the sketch has no dilation, received dilation={params.dilation}")
    if params.positions:
        return no(f"the sketch's global tokens are a prefix here, received scattered={params.scattered}")
    return YES
