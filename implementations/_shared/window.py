"""Which keys a token sees: a window around itself, and global tokens. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Global tokens, and a band around every other one.

    Token ``i`` that is not global sees the non-global keys ``i - t * dilation`` for ``-right <= t <= left``, and all
    global tokens. A global token sees every token. In the causal form both see themselves and earlier tokens only.

    Attributes:
        left, right: steps of the band to each side.
        dilation: tokens a step.
        num_global: the first so many tokens are global.
        causal: no token sees a later one.
        scattered: global tokens outside the prefix, ascending.
    """

    left: int
    right: int
    dilation: int
    num_global: int
    causal: bool
    scattered: tuple[int, ...] = ()

    @property
    def reach(self) -> int:
        """Earlier tokens, counted from the query, that the band still needs."""
        return self.left * self.dilation

    @property
    def end_of_globals(self) -> int:
        """The position after the last global token."""
        return self.scattered[-1] + 1 if self.scattered else self.num_global

    def steps(self, keys: int) -> int:
        """How many different distances there are in the band over so many keys."""
        return min(self.left, keys - 1) + min(self.right, keys - 1) + 1

    def keeps(self, tokens: int) -> int:
        """How many of ``tokens`` tokens the band of a causal layer must remember: the prefix and the last ``reach``."""
        return min(tokens, self.num_global + self.reach)

    def met(self, tokens: int) -> int:
        """How many scattered globals are among the first ``tokens`` tokens."""
        return bisect_left(self.scattered, tokens)

    def sees(self, i: int, seq_len: int) -> set[int]:
        """The keys that token ``i`` of ``seq_len`` sees."""
        end = i + 1 if self.causal else seq_len
        everywhere = {*range(min(self.num_global, end)), *self.scattered[: self.met(end)]}
        if i < self.num_global or i in self.scattered:
            return set(range(end))
        steps = (i - t * self.dilation for t in range(-self.right, self.left + 1))
        return everywhere | {key for key in steps if self.num_global <= key < end}


class GlobalRows(NamedTuple):
    """The global rows of one call: their queries ``[B, H, G, D]``, and the keys and values of all tokens they may see.

    ``at`` is the place of each row's own token among those keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    at: tuple[int, ...]


class Scattered(NamedTuple):
    """Scattered globals met so far, as every other token sees them: ``k, v: [B, H, x, D]``.

    ``at`` is the place of each among the keys of the call, ascending; negative or inside the prefix where it has left
    the window.
    """

    k: Tensor
    v: Tensor
    at: tuple[int, ...]

    def rows(self, T: int, S: int) -> list[int]:
        """Which of the T queries, the last of S keys, they are."""
        return [place - (S - T) for place in self.at if place >= S - T]
