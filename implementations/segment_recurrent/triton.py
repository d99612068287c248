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


class Attend:
    """An operator, see ``layer``, that takes the memory apart from the segment."""

    apart = True

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, begins: bool,
        memory: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``; ``causal``: the last n keys are the queries' own tokens.

        ``memory``: keys and values ``[B, H, m, D]`` that all queries see besides.
        """
        if memory is None and is_decoding(q, k, v):
            return decode(q, k, v, causal=causal)[0]
        ranges = [Range(k, v, high=Line(base=1) if causal else None)]
        if memory is not None and memory[0].shape[2]:
            ranges.insert(0, Range(*memory))
        return attend_ranges(q, ranges, offset=k.shape[2] - q.shape[2] if causal else 0)[0]


attend = Attend()


class DiagonalTritonStack(DiagonalStack):
    """The diagonal schedule with one launch of our kernels for all cells of a diagonal."""

    operator = attend
