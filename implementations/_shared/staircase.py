"""Which rows of a segmented sequence see which keys, as plain integers; torch-free: formulas share its constants.

Row ``i`` of a sequence that starts ``phase`` tokens into a segment lies in the segment that begins at token
``i - (phase + i) % segment_len`` and sees the keys from ``mem_len`` before that token up to itself: a staircase. Where
what left the memory is compressed, it sees the last of those entries too, in front of the memory: a second staircase.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 128  # queries a block: small enough to skip most of the causal half, large enough for full GEMM speed
PANEL = 64  # of the native kernel: distances packed together
SLAB = 1 << 20  # scores a product: two such products of float32 stay in a last-level cache


class Far(NamedTuple):
    """Compressed entries in front of the memory: ``known`` exist before the call, at most ``capacity`` are seen."""

    known: int
    capacity: int
    rate: int


NO_FAR = Far(0, 0, 1)


class Block(NamedTuple):
    """Equal blocks of ``count`` consecutive segments, computed together.

    Attributes:
        first: token at which the first of these segments begins its queries.
        rows: queries of each segment, and the step from one segment to the next.
        offset: of the block inside its segment's queries; it has ``queries`` rows.
        keys: keys of each block, compressed ones included; the last one is the last query's own token.
        own: how many of them, counted from the end, belong to the segment itself.
        far: how many of them, counted from the front, are compressed entries.
        first_far: number of the first of these entries; each next segment sees ``far_step`` entries further.
    """

    first: int
    rows: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    offset: int
    queries: int
    keys: int
    own: int
    far: int = 0
    first_far: int = 0
    far_step: int = 0

    @property
    def first_key(self) -> int:
        """Token of the first key that is not compressed; negative in the past."""
        return self.first + self.offset + self.queries - (self.keys - self.far)


class _Segments(NamedTuple):
    """``count`` equal segments, of which ``known`` rows each came with an earlier call."""

    first: int
    rows: int
    count: int  # type: ignore[assignment]
    memory: int
    known: int
    far: int
    first_far: int
    far_step: int


def blocks(
    tokens: int, past: int, phase: int, segment_len: int, mem_len: int, heads: int, slab: int = SLAB, far: Far = NO_FAR
) -> Iterator[Block]:
    """Cover ``tokens`` queries that follow ``past`` known rows; ``heads`` counts the batch in."""
    begin = -phase
    while begin < tokens:
        first, end = max(begin, 0), min(begin + segment_len, tokens)
        memory = min(mem_len, past + begin)
        entries = far.known + (past + begin - memory) // far.rate
        seen = min(far.capacity, entries)
        full = memory == mem_len and seen == far.capacity
        regular = first == begin and end == begin + segment_len and full
        count = (tokens - begin) // segment_len if regular else 1
        step = segment_len // far.rate if seen else 0
        segments = _Segments(first, end - first, count, memory, first - begin, seen, entries - seen, step)
        yield from _split(segments, heads, slab)
        begin += count * segment_len


def _split(segments: _Segments, heads: int, slab: int) -> Iterator[Block]:
    for offset in range(0, segments.rows, BLOCK):
        queries = min(BLOCK, segments.rows - offset)
        own = segments.known + offset + queries
        keys = segments.far + segments.memory + own
        group = max(1, slab // (heads * queries * keys))
        for skipped in range(0, segments.count, group):
            yield Block(
                segments.first + skipped * segments.rows, segments.rows, min(group, segments.count - skipped), offset,
                queries, keys, own, segments.far, segments.first_far + skipped * segments.far_step, segments.far_step,
            )  # fmt: skip
