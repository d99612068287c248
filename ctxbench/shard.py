"""One part of a plan, so that several machines of one kind measure it together; ``ctxbench merge`` joins the parts.

Every machine makes the whole plan and takes its own part of it, so all must agree without talking to each other: a
cell's weight is what its formulas cost at fixed nominal ceilings, never what this machine has measured. The heaviest
cells are dealt first, each to the part with the least so far (Graham 1969), so that no part is heavier than the
lightest one by more than its lightest cell. What cannot run is dealt too: every planned cell has its row.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import msgspec

from ctxbench.cell import Cell
from ctxbench.cost.figures import Figures
from ctxbench.cost.roofline import Ceilings, call_model
from ctxbench.errors import UserError

NOMINAL = Ceilings(flops_per_s={"fp32": 1e11}, bytes_per_s=1e10, calibrated=False)
CALLS, CELL_S = 40, 2.0  # calls of a whole cell, and seconds that a cell of the shortest calls takes
MOST_S = 180.0  # a longer cell is cut short by its timeout


class Weighable(Protocol):
    """A planned cell, as far as its part depends on it."""

    @property
    def cell(self) -> Cell: ...

    @property
    def figures(self) -> Figures | None: ...


_Planned = TypeVar("_Planned", bound=Weighable)


class Shard(msgspec.Struct, frozen=True):
    """Part ``index`` of ``count``, counted from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse(text: str) -> Shard:
    """``2/8`` is the second of eight parts.

    Raises:
        UserError: for anything else.
    """
    index, slash, count = (part.strip() for part in text.partition("/"))
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise UserError(
            f"malformed --shard {text!r}\n  accepted: i/n with 1 <= i <= n, for example 1/4 on the first of four "
            "machines, 2/4 on the second"
        )
    return Shard(int(index), int(count))


def part(cells: Sequence[_Planned], shard: Shard) -> list[_Planned]:
    """The cells of one part, in the order of the plan."""
    loads = [(0.0, index) for index in range(1, shard.count + 1)]
    own = set()
    for planned in sorted(cells, key=lambda planned: (-weight(planned), planned.cell.key)):
        load, index = heapq.heappop(loads)
        heapq.heappush(loads, (load + weight(planned), index))
        if index == shard.index:
            own.add(planned.cell.key)
    return [planned for planned in cells if planned.cell.key in own]


def weight(planned: Weighable) -> float:
    """Nominal seconds that measuring a cell takes, on every machine the same; the least where there is no formula."""
    if planned.figures is None:
        return CELL_S
    return CELL_S + min(CALLS * call_model(planned.cell, planned.figures, NOMINAL), MOST_S)


def digest(keys: Iterable[str]) -> str:
    """Identity of a set of cells: parts of one plan carry the same."""
    return hashlib.blake2b("\n".join(sorted(keys)).encode(), digest_size=8).hexdigest()
