"""All windows of a sequence in one launch, and what reads or writes states by the same kernels without a bound."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.biased_window import Compact, Pieces
from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges


class Window:
    """Sliding-window attention with scaled queries and a bias by distance."""

    compact = True

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sizes: Compact) -> torch.Tensor:
        """``q: [B, H, T, D]``, the last T of the rows of ``k, v: [B, H, S, D]``; result ``[B, H, T, D]``."""
        W, bias = sizes
        if bias is None and q.shape[2] == 1 and is_decoding(q, k, v):  # of several queries each has a window of its own
            nearest = slice(max(k.shape[2] - W, 0), None)
            return decode(q, k[:, :, nearest], v[:, :, nearest], scale=1.0)[0]
        return self.apart(q, [(k, v)], sizes)

    def apart(self, q: torch.Tensor, pieces: Pieces, sizes: Compact) -> torch.Tensor:
        """The same over pieces of keys that follow one another, the last of which ends where the queries do."""
        W, bias = sizes
        ranges, start = [], 0
        for k, v in pieces:  # lines over a piece's own keys
            low, high = Line(base=1 - W - start), Line(base=1 - start)
            ranges.append(Range(k, v, low=low, high=high, start=start))
            start += k.shape[2]
        return attend_ranges(q, ranges, offset=start - q.shape[2], scale=1.0, bias=bias)[0]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``softmax(q k^T) v`` over these keys and ``more``; the scale is in the queries.

    ``q: [B, H, n, D]``, result likewise.
    """
    if more and is_decoding(q, k, v):  # few queries: the keys are split over the device, which wants them in one piece
        k, v = (torch.cat(parts, dim=2) for parts in zip((k, v), *more, strict=True))
        more = ()
    if not more and is_decoding(q, k, v):
        return decode(q, k, v, causal=False, scale=1.0)[0]
    return attend_ranges(q, [Range(*each) for each in ((k, v), *more)], scale=1.0)[0]


OPERATORS = (Window(), attend)
