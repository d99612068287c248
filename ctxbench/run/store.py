"""The run folder: what is finished stays finished, whatever happens to the process or the disk.

``run.json`` describes the run. ``rows.jsonl`` gets one line a finished cell, appended and synced; a row that is
measured again is appended too, and the last line of a cell counts. ``journal.jsonl`` gets one line a finished child
process, so that a killed run loses at most the child in flight. ``lock`` is held while a run writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ctxbench import rows
from ctxbench.cell import PROTOCOL
from ctxbench.errors import EnvironmentUnusable, RunFolderError
from ctxbench.rows import Row
from ctxbench.run.tasks import Outcome

RUN_SCHEMA = "ctxbench.run/1"
RUN, ROWS, JOURNAL, LOCK = "run.json", "rows.jsonl", "journal.jsonl", "lock"
_T = TypeVar("_T")


class Entry(msgspec.Struct, kw_only=True):
    """A finished child process of one cell."""

    protocol: int = PROTOCOL
    cell: str
    kind: str  # time, memory or trace
    process: int
    outcome: Outcome


class _Tag(msgspec.Struct):
    schema: str = ""


def now() -> str:
    """UTC, to the second, as run.json and rows write it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_folder(parent: Path, suite: str) -> Path:
    """A name for a run that sorts by time and clashes with none: ``20261121T101500Z-scaling-3fa9``."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in Path(suite).stem)
    return parent / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{stem}-{secrets.token_hex(2)}"


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json``; empty where there is none yet.

    Raises:
        RunFolderError: when it is not JSON or of another schema.
    """
    try:
        content = (folder / RUN).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunFolderError(f"cannot read {folder / RUN}: {error.strerror}") from None
    try:
        header: dict[str, Any] = msgspec.json.decode(content, type=dict)
    except msgspec.MsgspecError:
        raise RunFolderError(f"{folder / RUN} is damaged: it is not JSON\n  {_elsewhere()}") from None
    _check_schema(header.get("schema", ""), RUN_SCHEMA, folder / RUN)
    return header


def read_rows(folder: Path) -> list[Row]:
    """All rows of a run, the last one of each cell; a torn last line, left by a crash, is not counted.

    Raises:
        RunFolderError: for a folder without rows, a damaged line or rows of another schema.
    """
    if not (folder / ROWS).is_file() and (folder / RUN).is_file():
        return []  # interrupted before the first cell had finished
    if not (folder / ROWS).is_file():
        raise RunFolderError(f"{folder} is not a run folder: it has no {ROWS}\n  `ctxbench run` writes one under runs/")
    found, _ = _read_lines(folder / ROWS, _row)
    return list({row.cell: row for row in found}.values())


class Store:
    """An open, locked run folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, Row] = {}
        self.outcomes: dict[str, list[Entry]] = defaultdict(list)
        self.header: dict[str, Any] = {}
        self.notes: list[str] = []
        self._files: dict[str, int] = {}
        self._superseded = False

    @classmethod
    def open(cls, folder: Path, fresh: bool = False) -> Store:
        """Create or continue a run folder and lock it; ``fresh`` removes the rows of earlier sessions.

        Raises:
            RunFolderError: locked by another run, damaged, of another schema, or a folder that is something else.
            EnvironmentUnusable: not writable, or the disk is full.
        """
        store = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(folder)
            store._lock()
            if fresh:
                for name in (RUN, ROWS, JOURNAL, "report.html"):
                    (folder / name).unlink(missing_ok=True)
            store._load()
        except OSError as error:
            store.close()
            raise store._unusable(error) from None
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files and the lock."""
        for handle in self._files.values():
            with contextlib.suppress(OSError):
                os.close(handle)
        self._files.clear()

    def write_header(self, header: dict[str, Any]) -> None:
        """Replace ``run.json`` in one step."""
        self.header = {"schema": RUN_SCHEMA, **header}
        self._replace(RUN, msgspec.json.format(msgspec.json.encode(self.header), indent=2))

    def append_row(self, row: Row) -> None:
        """Add a finished cell; it is on the disk when this returns."""
        self._append(ROWS, rows.encode(row))
        self._superseded |= row.cell in self.rows
        self.rows[row.cell] = row

    def append_outcome(self, entry: Entry) -> None:
        """Add a finished child process; it is on the disk when this returns."""
        self._append(JOURNAL, msgspec.json.encode(entry) + b"\n")
        self.outcomes[entry.cell].append(entry)

    def forget(self, cells: Iterable[str]) -> None:
        """Drop the children of these cells, so that they are measured from the beginning; their rows stay for now."""
        if [cell for cell in cells if self.outcomes.pop(cell, None)]:
            kept = (entry for entries in self.outcomes.values() for entry in entries)
            self._replace(JOURNAL, b"".join(msgspec.json.encode(entry) + b"\n" for entry in kept))

    def compact(self, cells: Iterable[str]) -> None:
        """Leave exactly the last row of each of these cells, in this order, in one step."""
        wanted = [cell for cell in cells if cell in self.rows]
        if self._superseded or wanted != list(self.rows):
            self.rows = {cell: self.rows[cell] for cell in wanted}
            self._replace(ROWS, b"".join(rows.encode(row) for row in self.rows.values()))
            self._superseded = False

    def _lock(self) -> None:
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._files[LOCK] = handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            holder = os.read(handle, 32).decode(errors="replace").strip()
            raise RunFolderError(
                f"another run{f' (process {holder})' if holder else ''} is writing to {self.folder}\n"
                "  wait for it, stop it, or choose another folder with --out"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())

    def _load(self) -> None:
        self.header = read_run(self.folder)
        found = self._repaired(ROWS, _row)
        self.rows = {row.cell: row for row in found}
        self._superseded = len(found) != len(self.rows)
        for entry in self._repaired(JOURNAL, _entry):
            if entry.protocol == PROTOCOL:
                self.outcomes[entry.cell].append(entry)

    def _repaired(self, name: str, decode: Callable[[bytes], _T]) -> list[_T]:
        """Read a file of lines and cut off a line that a crash left half written."""
        path = self.folder / name
        if not path.exists():
            return []
        found, good = _read_lines(path, decode)
        size = path.stat().st_size
        if good < size and path.is_file():
            os.truncate(path, good)
            self.notes.append(f"the last line of {name} was incomplete and has been removed ({size - good} bytes)")
        elif good > size:  # everything but the newline was written
            self._append(name, b"\n")
        return found

    def _append(self, name: str, line: bytes) -> None:
        try:
            if name not in self._files:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._files[name] = os.open(self.folder / name, flags, 0o644)
            handle = self._files[name]
            before = os.fstat(handle).st_size
            try:
                written = os.write(handle, line)
                if written != len(line):  # a disk that fills up takes part of a line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, before)
                raise
        except OSError as error:
            raise self._unusable(error) from None

    def _replace(self, name: str, content: bytes) -> None:
        partial = self.folder / f".{name}.{os.getpid()}"
        try:
            try:
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(self.folder / name)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._unusable(error) from None
        with contextlib.suppress(KeyError, OSError):  # appends go to the new file from now on
            os.close(self._files.pop(name))

    def _unusable(self, error: OSError) -> EnvironmentUnusable:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return EnvironmentUnusable(
                f"no space left for {self.folder}\n  every finished row is kept; free some space, then continue with "
                f"`ctxbench run --out {self.folder}`"
            )
        return EnvironmentUnusable(
            f"cannot write to {self.folder}: {error.strerror or error}\n  choose another folder with --out"
        )


def _read_lines(path: Path, decode: Callable[[bytes], _T]) -> tuple[list[_T], int]:
    """Decoded lines and the length they make up; a broken last line is left out, any other one is an error.

    The length is one above the file's when only the last newline is missing.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from None
    found: list[_T] = []
    good = 0
    for number, line in enumerate(io.BytesIO(content), start=1):
        end = good + len(line)
        try:
            if line.strip():
                found.append(decode(line))
        except msgspec.MsgspecError as error:
            if end >= len(content):
                return found, good
            raise RunFolderError(
                f"line {number} of {path} is damaged: {error}\n  remove that line and continue, or {_elsewhere()}"
            ) from None
        except _OtherSchema as other:
            _check_schema(str(other), rows.SCHEMA, path)
        good = end if line.endswith(b"\n") else end + 1
    return found, good


class _OtherSchema(Exception):
    pass


def _row(line: bytes) -> Row:
    schema = msgspec.json.decode(line, type=_Tag).schema
    if schema != rows.SCHEMA:
        raise _OtherSchema(schema)
    return rows.decode(line)


def _entry(line: bytes) -> Entry:
    return msgspec.json.decode(line, type=Entry)


def _check_schema(received: str, accepted: str, path: Path) -> None:
    if received != accepted:
        raise RunFolderError(
            f"{path} is of the schema {received or 'none'!r}\n  accepted: {accepted}\n"
            f"  read it with the version of ctxbench that wrote it, or {_elsewhere()}"
        )


def _refuse_foreign(folder: Path) -> None:
    """A folder with other things in it is not a run folder; --fresh must not remove files there by mistake."""
    if not any((folder / name).exists() for name in (RUN, ROWS, JOURNAL)):
        others = [path.name for path in folder.iterdir() if path.name != LOCK and not path.name.startswith(".")]
        if others:
            raise RunFolderError(
                f"{folder} is not a run folder: it holds {', '.join(sorted(others)[:3])}\n"
                "  accepted: a new or empty folder, or one that `ctxbench run` wrote"
            )


def _elsewhere() -> str:
    return "choose another folder with --out, or start over with --fresh"
