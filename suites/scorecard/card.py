"""What one tool came to in one discipline, and the tables made of it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

import msgspec

TITLES = {
    "timing": "Timing: median of a call against the median of many processes of the same machine and heap",
    "gates": "Gates: how often identical code is called slower, and how often a slow-down is found",
    "memory": "Peak memory of workloads of known size",
    "flops": "FLOPs of a forward pass against the closed form",
    "fits": "Growth: exponent at the longest length against the curve that was planted",
}


class Score(msgspec.Struct, kw_only=True):
    """One number: ``value`` in ``unit``, of ``quantity`` on ``work``; None where the tool gives none."""

    section: str
    tool: str
    work: str
    quantity: str
    value: float | None = None
    unit: str = ""
    note: str = ""


def version(distribution: str) -> str:
    """Installed version, empty where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def absent(section: str, distribution: str) -> list[Score]:
    """The row of a peer that is not installed; nothing where it is."""
    if version(distribution):
        return []
    return [Score(section=section, tool=distribution, work="-", quantity="-", note="not installed")]


def tables(scores: Iterable[Score]) -> str:
    """Markdown: a table a section, a line a tool and work, a column a quantity."""
    scores = list(scores)
    parts = []
    for section, title in TITLES.items():
        own = [score for score in scores if score.section == section]
        if not own:
            continue
        quantities = list(dict.fromkeys(score.quantity for score in own if score.quantity != "-"))
        head = f"| tool | work | {' | '.join(quantities)} | note |"
        lines = [f"## {title}", "", head, "|---" * (len(quantities) + 3) + "|"]
        for tool, work in dict.fromkeys((score.tool, score.work) for score in own):
            mine = {score.quantity: score for score in own if (score.tool, score.work) == (tool, work)}
            cells = [_show(mine.get(name)) for name in quantities]
            notes = "; ".join(dict.fromkeys(score.note for score in mine.values() if score.note))
            lines.append(f"| {tool} | {work} | {' | '.join(cells)} | {notes.replace('|', '/')} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _show(score: Score | None) -> str:
    if score is None or score.value is None:
        return "-"
    if score.unit == "%":
        return f"{score.value:+.1f} %"
    return f"{score.value:.3g} {score.unit}".rstrip()


def load(path: Path) -> list[Score]:
    """Scores of an earlier call; none where there is no file."""
    return msgspec.json.decode(path.read_bytes(), type=list[Score]) if path.exists() else []
