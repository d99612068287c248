"""Reading run folders: ``rows.jsonl`` (one row a line) and ``run.json`` (environment, configuration, command)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ctxbench.errors import RunFolderError
from ctxbench.rows import SCHEMA, Row, decode

ROWS, INFO = "rows.jsonl", "run.json"


class _Schema(msgspec.Struct):
    schema: str


@dataclass(frozen=True)
class Run:
    """One run as it lies on disk. ``warnings`` says what of it could not be read."""

    folder: Path
    rows: tuple[Row, ...]
    info: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """Read a run folder; where a cell has several rows the last one counts.

    Raises:
        RunFolderError: not a run folder, no row yet, another schema, or damaged before the last line.
    """
    path = folder / ROWS
    if not path.is_file() and (folder / INFO).is_file():
        raise _empty(folder)
    if not path.is_file():
        found = "no such path" if not folder.exists() else "a file" if folder.is_file() else f"a folder without {ROWS}"
        raise RunFolderError(
            f"not a run folder: {folder}\n  received: {found}\n  accepted: a folder that `ctxbench run` wrote, "
            f"with {ROWS} and {INFO} in it, such as runs/<id>"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}\n  check the permissions of the file") from None
    rows, warnings = _rows(path, content)
    info, trouble = _info(folder / INFO)
    if not rows:
        raise _empty(folder)
    return Run(folder, tuple(rows), info, (*warnings, *trouble))


def _empty(folder: Path) -> RunFolderError:
    return RunFolderError(
        f"no rows in {folder / ROWS}\n  a run writes one row for every planned cell; "
        f"`ctxbench run --resume --out {folder}` continues an interrupted one"
    )


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read several folders; a folder named twice is read once."""
    unique = {folder.resolve(): folder for folder in folders}
    if not unique:
        raise RunFolderError("no run folder given\n  accepted: one or more folders that `ctxbench run` wrote")
    return [read_run(folder) for folder in unique.values()]


def _rows(path: Path, content: bytes) -> tuple[list[Row], list[str]]:
    rows: dict[str, Row] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            schema = msgspec.json.decode(line, type=_Schema).schema
            if schema != SCHEMA:
                raise RunFolderError(
                    f"{path}, line {number}: schema {schema!r}\n  accepted: {SCHEMA!r}\n"
                    "  read it with the ctxbench version that wrote it, or measure again"
                )
            row = decode(line)
        except msgspec.MsgspecError as error:
            if number == len(lines):  # no newline after it: the writer was stopped in the middle of this row
                return list(rows.values()), [f"the last line of {path.name} is truncated and was left out ({error})"]
            raise RunFolderError(
                f"{path}, line {number} is damaged: {error}\n  accepted: one row of schema {SCHEMA!r} a line\n"
                "  remove the line, then `ctxbench run --resume` measures its cell again"
            ) from None
        rows.pop(row.cell, None)
        rows[row.cell] = row
    return list(rows.values()), []


def _info(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        return {}, [f"{path.name} is missing: the environment of this run is unknown"]
    try:
        info = msgspec.json.decode(path.read_bytes())
    except (msgspec.MsgspecError, OSError) as error:
        return {}, [f"{path.name} cannot be read ({error}): the environment of this run is unknown"]
    if not isinstance(info, dict):
        return {}, [f"{path.name} is not an object: the environment of this run is unknown"]
    return info, []
