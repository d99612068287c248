"""Which rows of the sequence see which keys, as plain integers; torch-free, so that formulas can share its constants.

Row ``i`` of a sequence that starts ``phase`` tokens into a segment lies in the segment that begins at token
``i - (phase + i) % segment_len`` and sees the keys from ``mem_len`` before that token up to itself: a staircase.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 128  # queries a block: small enough to skip most of the causal half, large enough for full GEMM speed
SLAB = 1 << 20  # scores a product: two such products of float32 stay in a last-level cache


class Block(NamedTuple):
    """Equal blocks of ``count`` consecutive segments, computed together.

    Attributes:
        first: token at which the first of these segments begins its queries.
        rows: queries of each segment, and the step from one segment to the next.
        offset: of the block inside its segment's queries; it has ``queries`` rows.
        keys: keys of each block; the last one is the last query's own token.
        own: how many of them, counted from the end, belong to the segment itself.
    """

    first: int
    rows: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    offset: int
    queries: int
    keys: int
    own: int

    @property
    def first_key(self) -> int:
        """Token of the first key; negative in the past."""
        return self.first + self.offset + self.queries - self.keys


def blocks(
    tokens: int, past: int, phase: int, segment_len: int, mem_len: int, heads: int, slab: int = SLAB
) -> Iterator[Block]:
    """Cover ``tokens`` queries that follow ``past`` known rows; ``heads`` counts the batch in."""
    begin = -phase
    while begin < tokens:
        first, end = max(begin, 0), min(begin + segment_len, tokens)
        memory = min(mem_len, past + begin)
        regular = first == begin and end == begin + segment_len and memory == mem_len
        count = (tokens - begin) // segment_len if regular else 1
        yield from _segments(first, end - first, count, memory, first - begin, heads, slab)
        begin += count * segment_len


def _segments(first: int, rows: int, count: int, memory: int, known: int, heads: int, slab: int) -> Iterator[Block]:
    """Blocks of ``count`` equal segments, of which ``known`` rows each came with an earlier call."""
    for offset in range(0, rows, BLOCK):
        queries = min(BLOCK, rows - offset)
        own = known + offset + queries
        group = max(1, slab // (heads * queries * (memory + own)))
        for skipped in range(0, count, group):
            yield Block(first + skipped * rows, rows, min(group, count - skipped), offset, queries, memory + own, own)
