"""Errors a user can cause, and the exit codes of the command line."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """Process exit codes; 0 also covers cells that were legitimately skipped."""

    OK = 0
    CELLS_FAILED = 1
    USAGE = 2
    REGRESSION = 3
    CHECK_FAILED = 4
    ENVIRONMENT = 5
    INTERRUPTED = 130


class CtxbenchError(Exception):
    """Base of every error that is shown without a traceback."""

    exit_code: Exit = Exit.CELLS_FAILED


class UserError(CtxbenchError):
    """Wrong input: a bad size, an unknown method, a malformed suite."""

    exit_code = Exit.USAGE


class PluginError(UserError):
    """A plug-in that cannot be loaded, or two that claim one name."""


class EnvironmentUnusable(CtxbenchError):
    """What was asked for is not on this machine (device, package, writable folder)."""

    exit_code = Exit.ENVIRONMENT


class RunFolderError(CtxbenchError):
    """A run folder that is locked, damaged, read-only or of another schema."""

    exit_code = Exit.USAGE


class MeasurementError(CtxbenchError):
    """A meter that cannot give an honest number here."""


def unwritable(path: Path, error: OSError, option: str = "") -> CtxbenchError:
    """Build the error for a place that cannot be written: a name's where nothing is there, else the environment's.

    ``option`` chooses another place.
    """
    message = (
        f"cannot write {path}: {error.strerror or error}\n  accepted: a folder that exists, is writable and has room"
    )
    message += f"\n  choose another place with {option}" if option else ""
    misnamed = error.errno in (errno.ENOENT, errno.EISDIR)
    return RunFolderError(message) if misnamed else EnvironmentUnusable(message)


def unknown(what: str, received: str, accepted: Iterable[str], hint: str = "") -> UserError:
    """Build the error for a name that is not in a closed set, with the nearest accepted name."""
    accepted = sorted(accepted)
    close = difflib.get_close_matches(received, accepted, n=1)
    message = f"unknown {what} {received!r}"
    if close:
        message += f"; did you mean {close[0]!r}?"
    message += f"\n  accepted: {', '.join(accepted) if accepted else '(none)'}"
    if hint:
        message += f"\n  {hint}"
    return UserError(message)
