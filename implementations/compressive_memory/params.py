"""Hyper-parameters of the compressive memory."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations._shared import flash_table
from ctxbench.method import Dims, Params, Support, param


@dataclass(frozen=True)
class CompressiveMemoryParams(Params):
    """Sizes of the memory in rows, of its items, and how many of these a segment reads."""

    segment_len: int = param(512, "tokens between two looks into the memory", unit="tokens", low=1)
    recent_len: int = param(512, "tokens kept as they are", unit="tokens", low=0)
    compressed_len: int = param(512, "compressed entries kept of what came before these", unit="entries", low=0)
    item_len: int = param(64, "rows of an item, the unit that is compressed and retrieved", unit="rows", low=1)
    rate: int = param(4, "neighbouring tokens that become one entry", unit="tokens", low=1, source="source document")
    top_k: int = param(5, "items a segment retrieves", unit="items", low=1, source="source document")

    def __post_init__(self) -> None:
        super().__post_init__()
        group = self.item_len * self.rate
        for name, unit in (("segment_len", group), ("recent_len", group), ("compressed_len", self.item_len)):
            if getattr(self, name) % unit:
                what = "item_len" if name == "compressed_len" else "item_len times rate"
                raise ValueError(f"{name} must be a multiple of {what}, received {getattr(self, name)} and {unit}")
        if not self.recent_len + self.compressed_len:
            raise ValueError("recent_len and compressed_len must not both be 0: nothing could be retrieved")

    def compressions(self, tokens: int) -> int:
        """Items made of the ``rate`` oldest ones each, when a segment begins after so many tokens."""
        return max(0, tokens - self.recent_len) // (self.item_len * self.rate)

    def recent(self, tokens: int) -> int:
        """Items kept as they are at that moment."""
        return min(tokens, self.recent_len) // self.item_len

    def compressed(self, tokens: int) -> int:
        """Compressed items kept at that moment."""
        return min(self.compressed_len // self.item_len, self.compressions(tokens))

    def numbers(self, tokens: int) -> tuple[range, range]:
        """Of the compressed and the recent items in memory at that moment, counted from the first of their kind."""
        made, end = self.compressions(tokens), tokens // self.item_len
        return range(made - self.compressed(tokens), made), range(end - self.recent(tokens), end)

    def places(self, compressed: range, recent: range) -> list[list[int]]:
        """Positions of all rows of these items; an entry stands where the last of the tokens it is made of did."""
        n, c = self.item_len, self.rate
        entries = [[c * entry + c - 1 for entry in range(item * n, (item + 1) * n)] for item in compressed]
        return entries + [list(range(item * n, (item + 1) * n)) for item in recent]

    def retrieved(self, tokens: int) -> int:
        """Items the segment reads."""
        return min(self.top_k, self.recent(tokens) + self.compressed(tokens))


def triton_support(dims: Dims, params: CompressiveMemoryParams, device: str, dtype: str) -> Support:
    """What the flash kernels hold in registers; segments are stacked into their batch."""
    stacked = dims.batch_size * -(-dims.seq_len // params.segment_len)
    return flash_table.support(dims.replace(batch_size=stacked), dtype)


def reach(dims: Dims, params: CompressiveMemoryParams, i: int) -> frozenset[int]:
    """Input positions that may influence output ``i``: what is in memory, retrieved or not, since it might have been.

    The segment before also asks the question. A set and not a range, which would promise gradients at its ends.
    """
    lowest = i
    for _ in range(dims.num_layers):
        begin = lowest - lowest % params.segment_len
        kept = min(begin, params.recent_len) + params.compressed(begin) * params.item_len * params.rate
        lowest = min(lowest, begin - kept, max(0, begin - params.segment_len))
    return frozenset(range(lowest, i + 1))
