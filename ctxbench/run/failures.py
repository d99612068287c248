"""How a child failed, in the words of a row: oom, timeout, killed, error. Imports no torch."""

from __future__ import annotations

import re
import signal
import traceback
from types import FrameType
from typing import Any

from ctxbench.errors import CtxbenchError
from ctxbench.run.tasks import Outcome, Report, Request
from ctxbench.units import format_bytes, format_seconds

DETAIL = 4000  # characters of a traceback or log that a row keeps: the end
LOG_LINES = 20

_SCALE = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|[Tt]ried to allocate|out of memory|bad_alloc|[Cc]annot allocate memory|"
    r"could not create a (?:memory|primitive)|failed to allocate|Thread creation failed: Resource temporarily"
)


def of_exception(error: BaseException) -> Outcome:
    """Turn what a child raised into its outcome: ``oom`` for every kind of allocation failure, else ``error``."""
    text = str(error).strip()
    trace = "".join(traceback.format_exception(error))[-DETAIL:]
    if is_out_of_memory(error):
        asked = _ASKED.search(text)
        size = f"asked for {format_bytes(float(asked[1]) * _SCALE[asked[2]])} more" if asked else "allocation failed"
        return Outcome(status="oom", reason=f"{size}{_place(error)}", detail=trace)
    if isinstance(error, CtxbenchError):
        return Outcome(status="error", reason=text, detail=trace)
    if isinstance(error, SystemExit):
        return Outcome(status="error", reason=f"the method called exit({error.code!r})", detail=trace)
    first = text.splitlines()[0] if text else ""
    reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return Outcome(status="error", reason=f"{reason}{_place(error)}", detail=trace)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, is a failed allocation."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, (RuntimeError, OSError)) and _OUT_OF_MEMORY.search(str(seen)):
            return True
        seen = seen.__cause__
    return False


def of_report(report: Report, request: Request) -> Outcome:
    """Turn how a child ended into its outcome; one that delivered a result keeps it, with its log as detail."""
    log = "\n".join(report.log.splitlines()[-LOG_LINES:])[-DETAIL:]
    if report.timed_out:
        reason = f"no result within {format_seconds(request.timeout_s)}"
        return Outcome(status="timeout", reason=reason, detail=log, elapsed_s=report.elapsed_s)
    if report.outcome is not None:
        outcome = report.outcome
        outcome.elapsed_s = report.elapsed_s
        if outcome.status != "ok" and log:
            outcome.detail = f"{outcome.detail}\nlast lines printed:\n{log}".strip()
        return outcome
    status, reason = _without_result(report, request)
    return Outcome(status=status, reason=reason, detail=log, elapsed_s=report.elapsed_s)


def _without_result(report: Report, request: Request) -> tuple[str, str]:
    limit = "" if request.memory_limit is None else f" (limit {format_bytes(request.memory_limit)})"
    if report.exit_code == -signal.SIGKILL and report.oom_kills:
        return "oom", f"the kernel ran out of memory and killed the process{limit}"
    if _OUT_OF_MEMORY.search(report.log):
        return "oom", f"the process ended because an allocation failed{limit}"
    if report.exit_code < 0:
        return "killed", f"the process was ended by {signal_name(-report.exit_code)}"
    return "error", f"the process ended with exit code {report.exit_code} before it delivered a result"


def signal_name(number: int) -> str:
    """``SIGSEGV`` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _place(error: BaseException) -> str:
    """Where it happened: the innermost line of the method's own code, and the shapes of the tensors in sight."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if not _is_foreign(frame)]
    if not own:
        return ""
    frame = own[-1]
    entry = next(
        (entry for entry in reversed(traceback.extract_tb(error.__traceback__))
         if entry.filename == frame.f_code.co_filename), None,
    )  # fmt: skip
    if entry is None:
        return ""
    folder_and_file = "/".join(entry.filename.split("/")[-2:])
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in _tensors(frame)[:6])
    return f" at {folder_and_file}:{entry.lineno} `{entry.line}`" + (f", where {shapes}" if shapes else "")


def _is_foreign(frame: FrameType) -> bool:
    """Code of torch, of the standard library or of the harness: not what the author of a method can change."""
    module = str(frame.f_globals.get("__name__", ""))
    harness = module.startswith("ctxbench.") and not module.startswith("ctxbench.implementations.")
    return harness or module.partition(".")[0] in ("torch", "numpy", "importlib", "contextlib", "functools", "runpy")


def _tensors(frame: FrameType) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in frame.f_locals.items()
        if hasattr(value, "shape") and hasattr(value, "dtype") and name != "self"
    ]
