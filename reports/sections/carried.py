"""What one token costs after a context, and what is kept of the context: three tables a mode, flat or linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctxbench.analysis.carried import NEAR, Carried, carried, columns
from ctxbench.analysis.printable import printable
from ctxbench.reports.report import Report
from ctxbench.units import format_bytes, format_seconds, format_tokens

LEADS = {
    "decode": "One token after a context: what it takes, and what stays of the context.",
    "stream": "A sequence read segment by segment: what one of its tokens takes, and what stays between two calls.",
}
PARTS: tuple[tuple[str, str, Callable[[Any], str], str, str], ...] = (
    ("Time of one token", "token_s", format_seconds, "time_text", "over the last lengths, with a 95 % interval"),
    ("State", "state_bytes", format_bytes, "state_text", "what must be kept from one call to the next"),
    ("Peak of a call", "peak_bytes", format_bytes, "peak_text", "above parameters, inputs and the incoming state"),
)


def wanted(report: Report) -> bool:
    """Only of runs that decode or stream."""
    return bool(_kept(report))


def context(report: Report) -> dict[str, Any]:
    """What ``carried.j2`` prints."""
    kept = _kept(report)
    modes = []
    for mode in (mode for mode in LEADS if any(each.mode == mode for each in kept)):
        series = [each for each in kept if each.mode == mode]
        shown = columns(series)
        tables = [
            (f"{title}: {note}", ("series", *map(format_tokens, shown), "growth"),
             [_line(each, shown, values, text, grows) for each in series])
            for title, values, text, grows, note in PARTS
        ]  # fmt: skip
        modes.append({"lead": LEADS[mode], "tables": tables})
    return {"modes": modes, "near": NEAR}


def _kept(report: Report) -> list[Carried]:
    return [each for run in report.runs for each in carried(run.rows, report.registry)]


def _line(each: Carried, shown: list[int], values: str, text: Callable[[Any], str], grows: str) -> list[str]:
    at = dict(zip(each.lengths, getattr(each, values), strict=True))
    memory = f" (memory {format_tokens(each.memory)})" if each.memory is not None else ""
    cells = [text(at[length]) if length in at else "-" for length in shown]
    return [printable(f"{each.method} / {each.impl}, {each.dtype}{memory}"), *cells, getattr(each, grows) or "-"]
