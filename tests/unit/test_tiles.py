"""What launches load, store and multiply, counted by walking their tiles in plain Python, at the shipped tile sizes.

The closed forms of ``tiles``, ``relative_tiles`` and their like must be exactly that. Triton's interpreter holds them
against the kernels themselves, at small tiles; see ``tests/gpu/interpreted.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from ctxbench.implementations._shared import decode_table, flash_table, relative_tiles, tiles
from ctxbench.implementations._shared.flash_table import Config
from ctxbench.implementations._shared.lines import PLAIN, SLOPES, TABLE, Line, place
from ctxbench.implementations._shared.relative_table import Stair, row_parts, tile
from ctxbench.implementations._shared.relative_tiles import Launch
from ctxbench.implementations._shared.tiles import Keys, Work
from ctxbench.implementations.memory_bank import gate_tiles
from ctxbench.implementations.routing import gathered_tiles, launch

NUMBER, WIDTH = 4, 64
OWN = Line(base=1)
RANGES: dict[str, tuple[int, int, int, Line | None, Line | None]] = {  # queries, keys, offset, low, high
    "causal": (517, 517, 0, None, OWN),
    "both directions": (389, 389, 0, None, None),
    "band": (1031, 1031, 0, Line(base=-255), OWN),
    "band on both sides": (401, 401, 0, Line(base=-31), Line(base=33)),
    "band behind a cache": (131, 700, 569, Line(base=-127), OWN),
    "segments and memory": (611, 611, 0, Line(96, 96, 0, -64), OWN),
    "whole blocks before": (599, 37, 0, None, Line(step=16)),
    "fewer keys than queries": (300, 41, 0, Line(base=-259), Line(base=-200)),
    "a token": (1, 97, 96, None, OWN),
}


@pytest.mark.parametrize("bias", [PLAIN, SLOPES, TABLE], ids=["plain", "slopes", "table"])
@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("name", RANGES)
def test_launches_over_ranges_move_what_a_walk_along_their_lines_counts(
    name: str, architecture: int, bias: int
) -> None:
    queries, keys, offset, low, high = RANGES[name]
    placed = [place(line, offset, queries, keys) for line in (low, high)]
    one = Keys(keys, *placed, bias, ahead=-offset)
    starts = [0 if low is None else min(max(low.at(row + offset), 0), keys) for row in range(queries)]
    ends = [keys if high is None else min(max(high.at(row + offset), 0), keys) for row in range(queries)]
    for kernel in ("forward", "dq", "dkv", *(("table",) if bias == TABLE else ())):
        for itemsize in (2, 4):
            chosen = flash_table.config(kernel, WIDTH, itemsize, architecture, heavy=bias != PLAIN, table=bias == TABLE)
            found = tiles.attended(kernel, chosen, queries, [one], WIDTH, itemsize, heads=3, farthest=128)
            assert found == walked(kernel, chosen, starts, ends, keys, one, itemsize, 128) * 3, (kernel, itemsize)
            assert found.moved == found.loaded + found.stored > 0


def walked(
    kernel: str, chosen: Config, starts: list[int], ends: list[int], keys: int, one: Keys, itemsize: int, farthest: int
) -> Work:  # fmt: skip
    """One head of one launch, tile by tile and pair by pair; row r sees the keys ``starts[r] .. ends[r]``."""
    row, queries, work = WIDTH * itemsize, len(starts), Work()
    place = np.arange(keys)
    seen = (place >= np.array(starts)[:, None]) & (place < np.array(ends)[:, None])
    distance = place + one.ahead - np.arange(queries)[:, None]
    by_keys = kernel == "dkv"
    mine, theirs = (chosen.columns, chosen.rows) if by_keys else (chosen.rows, chosen.columns)
    for own in cut(keys if by_keys else queries, mine):
        if by_keys:  # from the first row whose end is beyond the first key, to that whose start is beyond the last
            first = next((at for at, end in enumerate(ends) if end > own.start), queries)
            last = next((at for at, start in enumerate(starts) if start >= own.stop), queries)
            loaded, stored = 2 * len(own) * row, 2 * len(own) * row
        else:
            first, last = starts[own.start], ends[own.stop - 1]
            numbers = {"forward": 0, "dq": 1, "table": 2}[kernel]
            rows = {"forward": 1, "dq": 3, "table": 2}[kernel]
            loaded = len(own) * (rows * row + numbers * NUMBER)
            stored = 2 * NUMBER if kernel == "table" else len(own) * (row + NUMBER)
        work += Work(loaded=loaded, stored=stored)
        visited = range(first // theirs, -(-last // theirs))
        outside = np.ones(queries if by_keys else keys, bool)
        for number in visited:
            other = range(number * theirs, min(number * theirs + theirs, queries if by_keys else keys))
            outside[other.start : other.stop] = False
            pairs = np.s_[other.start : other.stop, own.start : own.stop]
            pairs = pairs if by_keys else pairs[::-1]
            whole = len(other) == theirs and bool(seen[pairs].all())
            if one.bias == TABLE:
                whole = whole and bool((abs(distance[pairs]) >= farthest).all())
            loaded = len(other) * (2 * row + 2 * NUMBER * by_keys)
            loaded += {PLAIN: 0, SLOPES: NUMBER, TABLE: NUMBER if whole else NUMBER * mine * theirs}[one.bias]
            stored = 0
            if kernel == "table" and not whole:  # sums by distance go out and, before, come in
                corner = other.start + one.ahead - own.start
                diagonals = range(corner - mine + 1, corner + theirs + 1)  # a power of two; the last has no pair
                near = [away for away in diagonals if abs(away) < farthest]
                stored = NUMBER * len(near)
            products = {"forward": 2, "dq": 3, "dkv": 4, "table": 2}[kernel]
            work += Work(1, int(whole), products, loaded + stored, stored)
        missed = seen[:, own.start : own.stop].any(1) if by_keys else seen[own.start : own.stop].any(0)
        assert not (missed & outside).any(), "a pair that is seen lies in no visited tile"
    return work


def cut(length: int, side: int) -> list[range]:
    return [range(start, min(start + side, length)) for start in range(0, length, side)]


@pytest.mark.parametrize("bias", [PLAIN, SLOPES, TABLE], ids=["plain", "slopes", "table"])
@pytest.mark.parametrize(
    ("size", "queries", "keys"), [(64, 601, 601), (16, 203, 203), (48, 330, 250), (128, 1000, 1000)]
)
def test_launches_over_lists_move_what_a_walk_along_the_lists_counts(
    size: int, queries: int, keys: int, bias: int
) -> None:
    pytest.importorskip("triton")
    import torch

    from ctxbench.implementations._shared import lists

    torch.manual_seed(size)
    heads, batch, rows, blocks = 2, 3, -(-queries // size), -(-keys // size)
    some = [torch.randint(0, blocks, (heads, rows - 1, 3)), torch.arange(blocks).expand(heads, 1, blocks)]
    made = lists.from_tables(size, keys, some, int((some[0] == blocks - 1).sum()))
    farthest, ahead = 70 * (bias == TABLE), -2 * size
    for kernel in ("forward", "dq", "dkv", "table")[: 4 if bias == TABLE else 3]:
        chosen = flash_table.listed_config(kernel, WIDTH, 2, 90, size, bias == TABLE)
        offsets, listed = made.offsets, made.listed
        if kernel == "dkv":
            offsets, listed = lists.turned(offsets, listed, blocks)
        own, other = (keys, queries) if kernel == "dkv" else (queries, keys)
        last = int((listed == -(-other // size) - 1).sum())
        ends, entries = offsets.tolist(), listed.tolist()
        apart = Counter(
            size * (at - row) + ahead
            for head in ends for row, (begin, end) in enumerate(pairwise(head)) for at in entries[begin:end]
        )  # fmt: skip
        found = tiles.listed(
            kernel, chosen, queries, keys, size, listed.numel(), last, WIDTH, 2, heads=heads, batch=batch, bias=bias,
            farthest=farthest, apart=apart,
        )  # fmt: skip
        counted = along_lists(kernel, chosen, own, other, size, ends, entries, bias, farthest, ahead)
        assert found == counted * batch, kernel


def along_lists(
    kernel: str, chosen: Config, own: int, other: int, size: int, offsets: list[list[int]], listed: list[int],
    bias: int, farthest: int, ahead: int,
) -> Work:  # fmt: skip
    """All heads of one sequence, entry by entry of the lists that the kernel gets; bf16."""
    row, work, by_keys = 2 * WIDTH, Work(), kernel == "dkv"
    mine, theirs = (chosen.columns, chosen.rows) if by_keys else (chosen.rows, chosen.columns)
    for ends in offsets:
        for block in range(-(-own // size)):
            for piece in range(0, size, mine):  # a piece beyond the end of a short block has steps too
                there = max(0, min(block * size + size, own) - block * size - piece)
                there = min(there, mine, size - piece)
                rows, numbers = {"forward": (1, 0), "dq": (3, 1), "dkv": (2, 0), "table": (2, 2)}[kernel]
                loaded = 2 * NUMBER + there * (rows * row + NUMBER * numbers)
                stored = there * (2 * row if by_keys else row + NUMBER)
                if kernel == "table":
                    stored = 2 * NUMBER
                work += Work(loaded=loaded, stored=stored)
                for at in listed[ends[block] : ends[block + 1]]:
                    for begin in range(at * size, at * size + size, theirs):
                        read = max(0, min(begin + theirs, at * size + size, other) - begin)
                        numbers = NUMBER * (1 + {PLAIN: 0, SLOPES: 1, TABLE: mine * theirs}[bias])
                        products = {"forward": 2, "dq": 3, "dkv": 4, "table": 2}[kernel]
                        added = 0
                        if kernel == "table":  # one number a diagonal of the tile, its empty one included
                            place = begin + ahead - block * size - piece
                            added = NUMBER * sum(
                                abs(place + one) < farthest for one in range(1 - chosen.rows, chosen.columns + 1)
                            )
                        loaded = numbers + added + read * (2 * row + 2 * NUMBER * by_keys)
                        work += Work(1, 0, products, loaded, added)
    return work


@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 4), (5, 4)])
@pytest.mark.parametrize(("keys", "width", "itemsize"), [(5, 64, 2), (4097, 64, 2), (1013, 128, 4), (131071, 128, 2)])
def test_launches_that_decode_move_what_a_walk_along_their_parts_counts(
    queries: int, group: int, keys: int, width: int, itemsize: int
) -> None:
    heads, chosen, row = 6, decode_table.config(width, itemsize), width * itemsize
    of_queries = cut(queries * group, chosen.rows)
    part = decode_table.chunk(heads * len(of_queries), keys, chosen.columns)
    parts = cut(keys, part)
    partial, merged = Work(), Work()
    for own in parts:
        for rows in of_queries:
            kept = row if len(parts) == 1 else width * NUMBER
            partial += Work(loaded=len(rows) * row, stored=len(rows) * (kept + NUMBER))
            for seen in cut(len(own), chosen.columns):
                partial += Work(1, 0, 2, 2 * len(seen) * row)
    for _ in range(queries * group if len(parts) > 1 else 0):
        merged += Work(loaded=len(parts) * (width * NUMBER + NUMBER), stored=row + NUMBER)
    found = tiles.decoded(
        chosen.rows, chosen.columns, queries, keys, part, width, itemsize, heads=heads, group=group
    )  # fmt: skip
    assert found == (partial * heads, merged * heads)


@pytest.mark.parametrize("by_slot", [False, True], ids=["by token", "by slot"])
@pytest.mark.parametrize(("earlier", "without_self"), [(False, False), (True, False), (True, True)])
def test_launches_over_clusters_move_what_a_walk_along_their_runs_counts(
    earlier: bool, without_self: bool, by_slot: bool
) -> None:
    runs = [(0, 0), (1, 1), (63, 63), (201, 201), (0, 40), (65, 130), *(() if earlier else ((7, 0), (130, 65)))]
    for kernel, itemsize in ((kernel, itemsize) for kernel in ("forward", "dq", "dkv") for itemsize in (2, 4)):
        chosen = launch.config(kernel, WIDTH, itemsize, 90)
        found = gathered_tiles.gathered(
            kernel, chosen, runs, WIDTH, itemsize, earlier=earlier, without_self=without_self, by_slot=by_slot
        )  # fmt: skip
        own = 1 if kernel == "dkv" else 0
        side = chosen.columns if own else chosen.rows
        programs = sum(run[own] for run in runs) // side + len(runs)
        work = Work(loaded=programs * (2 * len(runs) + 4) * NUMBER)
        for queries, keys in runs:
            work += along_run(kernel, chosen, queries, keys, itemsize, earlier, without_self, by_slot)
        assert found == work, (kernel, itemsize)


def along_run(
    kernel: str, chosen: Config, queries: int, keys: int, itemsize: int, earlier: bool, without_self: bool,
    by_slot: bool,
) -> Work:  # fmt: skip
    """The tiles of one run of a head, by which of its (query, key) pairs are seen."""
    row, work = WIDTH * itemsize, Work()
    aligned = np.arange(queries)[:, None] + keys - queries
    seen = np.ones((queries, keys), bool)
    if earlier:
        seen = np.arange(keys) <= np.maximum(aligned - without_self, 0)
    wide = WIDTH * NUMBER if by_slot else row
    if kernel == "dkv":
        for own in cut(keys, chosen.columns):
            work += Work(loaded=len(own) * (2 * row + NUMBER), stored=2 * len(own) * wide)
            tiles_ = cut(queries, chosen.rows)
            # Without a token itself, those that stand where a tile of keys begins may see none of it, and are visited.
            first = max(0, own.start - (keys - queries)) // chosen.rows if earlier else 0
            assert not any(seen[other.start : other.stop, own.start : own.stop].any() for other in tiles_[:first])
            for other in tiles_[first:]:
                numbers = 3 + by_slot
                work += Work(1, 0, 4, len(other) * (2 * row + numbers * NUMBER))
        return work
    for own in cut(queries, chosen.rows):
        back = kernel == "dq"
        once = 3 * row + (2 + by_slot) * NUMBER if back else row + NUMBER
        work += Work(loaded=len(own) * once, stored=len(own) * ((wide if back else row) + NUMBER))
        end = min(own.start + chosen.rows + keys - queries, keys) if earlier else keys
        for other in cut(keys, chosen.columns):
            pairs = seen[own.start : own.stop, other.start : other.stop]
            if other.start >= end:
                assert not pairs.any()
                continue
            full = len(other) == chosen.columns
            # What decides is the first query of the tile, which sees least.
            whole = full and other.stop <= aligned[own.start, 0] + 1 - without_self if earlier else full
            assert not whole or pairs.all()
            work += Work(1, int(whole), 3 if back else 2, len(other) * (2 * row + NUMBER))
    return work


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (130, 256), (77, 200)])
def test_launches_of_the_gate_move_what_a_walk_along_its_tiles_counts(tokens: int, width: int) -> None:
    rows, columns, depth, batch = 64, 32, 32, 3
    for kernel, keep in (("gate", False), ("gate", True), ("gradient", False)):
        back, work = kernel == "gradient", Work()
        for down in cut(tokens, rows):
            for number, across in enumerate(cut(width, columns)):
                for part in cut(width, depth):
                    left = len(down) * len(part)
                    work += Work(1, 0, 1, 2 * ((3 if back else 1) * left + len(across) * len(part)))
                    work += Work(stored=2 * left * (back and number == 0))
                result = len(down) * len(across)
                work += Work(loaded=2 * (2 if back else 3) * result, stored=2 * (1 + keep) * result)
        found = gate_tiles.gated(kernel, rows, columns, depth, tokens, width, 2, batch=batch, keep=keep)
        assert found == work * batch, (kernel, keep)


STAIRS = {  # rows, entries
    "segments": (509, 0, Stair(128, 128)),
    "no memory": (301, 0, Stair(100, 0)),
    "in the middle of a segment": (211, 0, Stair(96, 120, past=150, phase=30)),
    "the same number of keys": (333, 0, Stair(128, 70, band=1)),
    "the same number, streamed": (150, 0, Stair(96, 70, past=101, phase=5, band=1)),
    "dense": (275, 0, Stair()),
    "dense in both directions": (203, 0, Stair(causal=0, nearest=-202)),
    "a token": (1, 0, Stair(64, 64, past=97, phase=33)),
    "compressed": (451, 110, Stair(96, 60, capacity=40, rate=3)),
    "compressed, streamed": (260, 93, Stair(80, 70, past=101, phase=31, known=33, capacity=60, rate=4)),
}


@pytest.mark.parametrize("architecture", [90, 80])
@pytest.mark.parametrize("name", STAIRS)
def test_launches_of_the_relative_term_move_what_a_walk_along_the_stairs_counts(name: str, architecture: int) -> None:
    rows, entries, stair = STAIRS[name]
    distances = rows + stair.past - stair.nearest + 7
    for kernel, itemsize in ((kernel, itemsize) for kernel in STAIRWALKS for itemsize in (2, 4)):
        width = 32 if itemsize == 4 else WIDTH
        for of_entries in (False, True) if kernel == "dkv" and entries else (False,):
            far = of_entries if kernel == "dkv" else bool(entries)
            side = tile(kernel, width, itemsize, architecture, far).side
            one = Launch(rows, rows + stair.past, entries, distances, width, itemsize, side, stair)
            parts = row_parts(distances, rows, 2, stair, side)
            for split in (False, True) if kernel == "dkv" and not of_entries else (False,):
                found = relative_tiles.launched(
                    kernel, one, heads=2, of_entries=of_entries, split=split, parts=parts
                )  # fmt: skip
                walk = Stairwalk(one)
                STAIRWALKS[kernel](walk, of_entries, split, parts)
                assert found == walk.work * 2, (kernel, itemsize, of_entries, split)


class Stairwalk:
    """Counts, row by row, what the loops of a kernel of ``relative_kernels`` or ``relative_backward`` ask for."""

    def __init__(self, one: Launch):
        self.one, self.work, self.row = one, Work(), one.width * one.itemsize

    def rows(self, at: int, count: int, tensors: int = 1, numbers: int = 0) -> None:
        """Load a block of rows from ``at`` on of so many tensors of ``count`` rows, and numbers of as many."""
        there = sum(0 <= index < count for index in range(at, at + self.one.side))
        self.work += Work(loaded=there * (tensors * self.row + numbers * NUMBER))

    def tile(self, products: int) -> None:
        self.work += Work(1, 0, products)

    def store(self, channels: int, numbers: int) -> None:
        self.work += Work(stored=channels * self.one.itemsize + numbers * NUMBER)

    def low(self, row: int) -> int:
        stair = self.one.stair
        if stair.band:
            return max(0, row + stair.past - stair.memory + 1)
        begin = (row + stair.phase) // stair.segment * stair.segment - stair.phase
        return max(0, begin + stair.past - stair.memory)

    def entries(self, number: int) -> tuple[int, int, int]:
        stair = self.one.stair
        left = max(0, number * stair.segment - stair.phase + stair.past - stair.memory)
        made = stair.known + left // stair.rate
        return max(0, made - stair.capacity), made, stair.past - left + made

    def segment(self, row: int) -> int:
        return (row + self.one.stair.phase) // self.one.stair.segment

    def along_keys(self, back: bool) -> None:
        one, stair = self.one, self.one.stair
        for own in cut(one.rows, one.side):
            self.work += Work(loaded=2 * self.row)
            self.rows(own.start, one.rows, 3 if back else 1, int(back))
            last = own.stop + stair.past if stair.causal else one.keys
            loops = [(self.low(own.start), last, stair.past - stair.nearest, one.keys)]
            if one.entries:
                numbers = sorted({self.segment(row) for row in own})
                loops += [(*self.entries(number), one.entries) for number in numbers]
            for first, end, shift, count in loops:
                self.rows(own.start + shift - first, one.distances)
                self.work += Work(products=1)
                distance = own.start + shift - first
                for key in range(first, end, one.side):
                    distance = own.start + shift - key
                    self.rows(key, count, 2)
                    self.rows(distance - one.side, one.distances)
                    if back:
                        self.rows(distance, one.distances)
                    self.tile(5 if back else 3)
                if back:
                    self.rows(distance - one.side, one.distances)
                    self.work += Work(products=1)
            self.store(len(own) * one.width, len(own))

    def along_rows(self, of_entries: bool, split: bool) -> None:
        one, stair = self.one, self.one.stair
        count = one.entries if of_entries else one.keys
        numbers = range(self.segment(one.rows - 1) + 1)
        for own in cut(count, one.side):
            self.rows(own.start, count, 2)
            if of_entries:
                loops = []
                whole = range(own.start, own.start + one.side)  # entries that are not there yet count for a kernel
                for number in numbers:
                    first, end, shift = self.entries(number)
                    if max(first, whole.start) < min(end, whole.stop):
                        begin = number * stair.segment - stair.phase
                        loops.append((max(begin, 0), min(begin + stair.segment, one.rows), shift - own.start))
            else:
                loops = [(*ends, stair.past - stair.nearest - own.start) for ends in self.own_rows(own, split)]
            for first, end, shift in loops:
                for row in range(first, end, one.side):
                    self.rows(row, one.rows, 3, 2)
                    self.rows(row + shift, one.distances)
                    self.rows(row + shift - one.side, one.distances)
                    self.tile(6)
            self.store((4 if split else 2) * len(own) * one.width, one.width)

    def own_rows(self, own: range, split: bool) -> Sequence[tuple[int, int]]:
        """Rows that see a tile of keys: first those in segments of these keys, then those in later ones."""
        one, stair = self.one, self.one.stair
        seeing = [
            row for row in range(one.rows)
            if self.low(row) < own.stop and (row + stair.past >= own.start or not stair.causal)
        ]  # fmt: skip
        if not seeing:
            return []
        begin, end = seeing[0], seeing[-1] + 1
        if not split:
            return [(begin, end)]
        same = [row for row in seeing if (row + stair.phase) // stair.segment <= self.of_key(own.stop - 1)]
        later = [row for row in seeing if (row + stair.phase) // stair.segment > self.of_key(own.start)]
        return [(rows[0], rows[-1] + 1) for rows in (same, later) if rows]

    def of_key(self, key: int) -> int:
        """The segment that a key belongs to, before the first row too."""
        return (key - self.one.stair.past + self.one.stair.phase) // self.one.stair.segment

    def along_distances(self, parts: int) -> None:
        one, stair = self.one, self.one.stair
        segments = range(1 if stair.band else self.segment(one.rows - 1) + 1)
        for own, part in ((own, part) for own in cut(one.distances, one.side) for part in range(parts)):
            self.rows(own.start, one.distances)
            near = own.start + stair.nearest
            for number in segments[part::parts]:
                begin = 0 if stair.band else max(0, number * stair.segment - stair.phase)
                end = one.rows if stair.band else min(one.rows, (number + 1) * stair.segment - stair.phase)
                oldest = 0 if stair.band else self.low(begin)
                if stair.band and near >= stair.memory:
                    end = 0
                loops = [(oldest, one.keys, stair.past, one.keys)]
                if one.entries:
                    loops.append((*self.entries(number), one.entries))
                for first_key, end_key, shift, count in loops:
                    first = max(begin, near + first_key - shift)
                    for row in range(first, min(end, near + one.side - 1 - shift + end_key), one.side):
                        self.rows(row, one.rows, 3, 2)
                        self.rows(row + shift - near, count, 2)
                        self.rows(row + shift - near - one.side, count, 2)
                        self.tile(6)
            self.store(0, (len(own) + 1) * one.width)


STAIRWALKS: dict[str, Callable[[Stairwalk, bool, bool, int], None]] = {
    "forward": lambda walk, of_entries, split, parts: walk.along_keys(back=False),
    "dq": lambda walk, of_entries, split, parts: walk.along_keys(back=True),
    "dkv": lambda walk, of_entries, split, parts: walk.along_rows(of_entries, split),
    "dr": lambda walk, of_entries, split, parts: walk.along_distances(parts),
}
