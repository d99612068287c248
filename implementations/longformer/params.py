"""Hyper-parameters of Longformer, and the attention pattern they stand for."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.method import YES, Dims, Params, Support, no, param


@dataclass(frozen=True)
class Pattern:
    """Which keys a token sees: the prefix of global tokens, and a band around itself.

    Token ``i`` outside the prefix sees the non-global keys ``i - t * dilation`` for ``-right <= t <= left``, and all
    ``num_global`` prefix tokens. A prefix token sees every token; in the causal form itself and every earlier one.
    """

    left: int
    right: int
    dilation: int
    num_global: int
    causal: bool

    @property
    def reach(self) -> int:
        """Earlier tokens, counted from the query, that the band still needs."""
        return self.left * self.dilation

    def keeps(self, tokens: int) -> int:
        """How many of ``tokens`` tokens a causal layer must remember: the prefix and the last ``reach``."""
        return min(tokens, self.num_global + self.reach)

    def sees(self, i: int, seq_len: int) -> set[int]:
        """The keys that token ``i`` of ``seq_len`` sees."""
        end = i + 1 if self.causal else seq_len
        if i < self.num_global:
            return set(range(end))
        steps = (i - t * self.dilation for t in range(-self.right, self.left + 1))
        return {*range(self.num_global), *(key for key in steps if self.num_global <= key < end)}


@dataclass(frozen=True)
class LongformerParams(Params):
    """One layer's attention pattern; the same in every layer and head."""

    window: int = param(
        512,
        "causal: keys a token sees, itself included; bidirectional: window // 2 keys on each side and itself",
        unit="tokens",
        low=1,
        source="Beltagy et al. 2020, 4.2",
    )
    num_global: int = param(16, "prefix tokens that see all tokens and that all tokens see", unit="tokens", low=0)
    dilation: int = param(1, "distance between neighbouring keys of the window", unit="tokens", low=1)
    separate_global: bool = param(
        True, "global tokens have query, key and value projections of their own", source="Beltagy et al. 2020, 3.1"
    )

    def pattern(self, causal: bool) -> Pattern:
        """The pattern in one direction of attention."""
        left, right = (self.window - 1, 0) if causal else (self.window // 2, self.window // 2)
        return Pattern(left, right, self.dilation, self.num_global, causal)


def support(dims: Dims, params: LongformerParams, mode: str) -> Support:
    """State is of use only when later tokens cannot change earlier outputs."""
    if mode in ("stream", "decode") and not dims.causal:
        return no("a bidirectional layer cannot be continued: a token sees window // 2 later tokens, a global one all")
    return YES


def reach(dims: Dims, params: LongformerParams, i: int) -> set[int]:
    """Input positions that may influence output ``i``: what it sees, and what that has seen in the layers below."""
    pattern, reached = params.pattern(dims.causal), {i}
    for _ in range(dims.num_layers):
        reached = set().union(*(pattern.sees(j, dims.seq_len) | {j} for j in reached))
    return reached


def sketch_support(dims: Dims, params: LongformerParams, device: str, dtype: str) -> Support:
    """The sketch has no dilation."""
    if params.dilation > 1:
        return no(f"the sketch has no dilation, received dilation={params.dilation}")
    return YES
