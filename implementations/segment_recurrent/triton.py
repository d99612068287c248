"""Both looks by our kernels, causal at the last key: a memory before a segment needs neither mask nor padding.

Where a whole segment comes at once, nobody needs its keys behind those of the memory again: they stay two ranges of one
softmax, and nothing is joined.
"""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.decode import decode, is_decoding
from ctxbench.implementations._shared.ranges import Line, Range
from ctxbench.implementations._shared.ranges import attend as attend_ranges
from ctxbench.implementations.segment_recurrent.diagonal import DiagonalStack
from ctxbench.implementations.segment_recurrent.layer import Look


class Attend:
    """An operator, see ``layer``, that takes the memory apart from the segment."""

    apart = True

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, look: Look,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, result ``[B, H, n, D]``.

        ``memory``: keys and values ``[B, H, look.first, D]`` before those, which all queries see besides.
        """
        bias = look.position.compact()
        if memory is None and bias is None and is_decoding(q, k, v):
            return decode(q, k, v, causal=look.causal)[0]
        start = 0 if memory is None else look.first  # positions count from the first key of all
        ranges = [Range(k, v, high=Line(base=1 - start) if look.causal else None, start=start)]
        if memory is not None and memory[0].shape[2]:
            ranges.insert(0, Range(*memory, start=0))
        return attend_ranges(q, ranges, offset=look.first, bias=bias)[0]


attend = Attend()


class DiagonalTritonStack(DiagonalStack):
    """The diagonal schedule with one launch of our kernels for all cells of a diagonal."""

    impl = "diagonal_triton"
    operator = attend
