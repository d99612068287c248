"""What the rows say about every claim: one mark a term for each impl and mode, and contradictions in full."""

from __future__ import annotations

from typing import Any

from ctxbench.analysis.audit import FAILS, HOLDS, NOT_APPLICABLE, NOT_CLAIMED, VIOLATED, Verdict
from ctxbench.analysis.audit_rows import audit_rows
from ctxbench.reports.report import Report
from ctxbench.units import counted

MARKS = {HOLDS: "\u2713", VIOLATED: "\u2717", NOT_CLAIMED: "\u2013", NOT_APPLICABLE: ""}
UNITS = {"FLOPs": "FLOP", "peak memory": "B", "state bytes": "B"}  # of terms that begin so and whose values are bare
HEAD = ("method, impl, mode", "term", "claimed", "seen", "evidence")


def context(report: Report) -> dict[str, Any]:
    """What ``audit.j2`` prints. Runs are audited one by one: growth across machines would mean nothing."""
    methods = {name: entry.method for name, entry in report.registry.entries.items()}
    several = len(report.runs) > 1
    found = [(run.name if several else "", each) for run in report.runs for each in audit_rows(run.rows, methods)]
    answered = dict.fromkeys(verdict.term for _, verdict in found if verdict.verdict != NOT_APPLICABLE)
    lines: dict[str, dict[str, str]] = {}
    for run, verdict in found:
        lines.setdefault(_subject(run, verdict), {})[verdict.term] = _mark(verdict)
    subjects = len(lines)
    lines = {subject: marks for subject, marks in lines.items() if any(marks.values())}
    return {
        "silent": subjects - len(lines),
        "sentence": _sentence([verdict for _, verdict in found]),
        "head": ("method, impl, mode", *answered),
        "lines": [(subject, *(marks.get(term, "") for term in answered)) for subject, marks in lines.items()],
        "wrong_head": HEAD,
        "wrong": [
            (_subject(run, v), v.term, _valued(v.term, v.claimed), _valued(v.term, v.seen), v.evidence)
            for run, v in found if not v.ok
        ],
    }  # fmt: skip


def _valued(term: str, value: str) -> str:
    """A bare number with its unit."""
    unit = next((unit for start, unit in UNITS.items() if term.startswith(start)), "")
    return f"{value} {unit}" if unit and value.replace(",", "").isdecimal() else value


def _mark(verdict: Verdict) -> str:
    """A literal sketch that fails as it declares is no contradiction, and no check mark either."""
    return "defect" if verdict.verdict == HOLDS and verdict.claimed == FAILS else MARKS[verdict.verdict]


def _sentence(found: list[Verdict]) -> str:
    answered = [verdict for verdict in found if verdict.verdict in (HOLDS, VIOLATED)]
    wrong = sum(not verdict.ok for verdict in answered)
    right = len(answered) - wrong
    if not answered:
        return "The rows hold no numbers that could be held against a claim."
    outcome = f"{wrong} {'is' if wrong == 1 else 'are'} contradicted" if wrong else "none is contradicted"
    hold = f"{right} {'holds' if right == 1 else 'hold'}"
    return f"Of {counted(len(answered), 'claim')} that the rows can answer, {hold} and {outcome}."


def _subject(run: str, verdict: Verdict) -> str:
    return ", ".join(filter(None, (verdict.method, verdict.impl, verdict.mode, run)))
