"""Which inputs reach which outputs of a method: maps that ``ctxbench reach`` draws and a run folder keeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from ctxbench.errors import unwritable

FILE = "reach.json"
SCHEMA = "ctxbench.reach/1"
GRADIENT, VALUES, CLAIMED, NONE, UNCLAIMED = "gradient", "values", "claimed", "", "unclaimed"


class ReachMap(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen at a small size. A row an output position; bit j of its number is input position j.

    gradient: the output's derivative with respect to the input is not zero. values: the output changes with the input;
    memories that are cut from the graph pass values alone. claimed: ``METHOD.reach``; empty where the method names
    none. params and dims are those of the map.
    """

    method: str
    impl: str
    seq_len: int
    params: dict[str, Any]
    dims: dict[str, Any]
    gradient: list[str]
    values: list[str]
    claimed: list[str] = []
    draws: int = 1

    def state(self, output: int, position: int) -> str:
        """What connects one input to one output."""
        bit = 1 << position
        claimed = not self.claimed or int(self.claimed[output], 16) & bit
        if int(self.gradient[output], 16) & bit:
            return GRADIENT if claimed else UNCLAIMED
        if int(self.values[output], 16) & bit:
            return VALUES if claimed else UNCLAIMED
        return CLAIMED if self.claimed and claimed else NONE

    def counts(self) -> dict[str, int]:
        """Pairs of input and output by what connects them."""
        found = dict.fromkeys((GRADIENT, VALUES, CLAIMED, UNCLAIMED, NONE), 0)
        for output in range(self.seq_len):
            for position in range(self.seq_len):
                found[self.state(output, position)] += 1
        return found


class _File(msgspec.Struct, kw_only=True):
    schema: str = SCHEMA
    maps: list[ReachMap] = []


def read(folder: Path) -> dict[str, ReachMap]:
    """The maps of a run folder by method; none where it has none, or of another schema."""
    try:
        found = msgspec.json.decode((folder / FILE).read_bytes(), type=_File)
    except (OSError, msgspec.MsgspecError):
        return {}
    return {each.method: each for each in found.maps if _sound(each)} if found.schema == SCHEMA else {}


def write(folder: Path, maps: Iterable[ReachMap]) -> Path:
    """Store maps in a run folder.

    Raises:
        RunFolderError: there is no such folder.
        EnvironmentUnusable: it cannot be written, or the disk is full.
    """
    path = folder / FILE
    try:
        path.write_bytes(msgspec.json.encode(_File(maps=sorted(maps, key=lambda each: each.method))) + b"\n")
    except OSError as error:
        raise unwritable(path, error) from None
    return path


def _sound(each: ReachMap) -> bool:
    """Whether the rows are as many as there are positions, and numbers."""
    try:
        rows = [int(row, 16) for row in (*each.gradient, *each.values, *each.claimed)]
    except ValueError:
        return False
    return (
        0 < each.seq_len <= 512 and len(each.gradient) == len(each.values) == each.seq_len
        and len(each.claimed) in (0, each.seq_len) and all(0 <= row < 1 << each.seq_len for row in rows)
    )  # fmt: skip
