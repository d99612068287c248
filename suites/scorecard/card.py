"""What one tool came to in one discipline, what is kept of it, and the page made of it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ctxbench.env import fingerprint

TITLES = {
    "timing": "Timing: median of a call against plain loops in fresh processes before and after the tool",
    "gates": "Gates: how often identical code is called slower, and how often a slow-down is found",
    "memory": "Peak memory of workloads of known size",
    "flops": "FLOPs of a forward pass against the closed form",
    "fits": "Growth: exponent at the longest length against the curve that was planted",
}
PEERS = {  # distribution: what to import; a tool of any other name comes with ctxbench, torch or Python
    "asv": "asv",
    "big-O": "big_o",
    "calflops": "calflops",
    "fvcore": "fvcore.nn",
    "google-benchmark": "google_benchmark",
    "memray": "memray",
    "ptflops": "ptflops",
    "pyperf": "pyperf",
    "pytest-benchmark": "pytest_benchmark",
    "thop": "thop",
    "torchinfo": "torchinfo",
}
SHIPPED = {"ctxbench": "ctxbench", "torch.": "torch", "polling": "psutil"}  # beginning of a tool's name: distribution


class Score(msgspec.Struct, kw_only=True):
    """One number: ``value`` in ``unit``, of ``quantity`` on ``work``; None where the tool gives none."""

    section: str
    tool: str
    work: str
    quantity: str
    value: float | None = None
    unit: str = ""
    note: str = ""


class Part(msgspec.Struct, kw_only=True):
    """One tool in one section as it was measured: ``raw`` holds its numbers, ``absent`` why there are none."""

    section: str
    tool: str
    version: str
    measured_at: str
    elapsed_s: float = 0.0
    absent: str = ""
    raw: Any = None


class Card(msgspec.Struct, kw_only=True):
    """Every part measured so far, all of one machine."""

    machine: dict[str, Any]
    parts: list[Part] = []

    def raws(self, section: str) -> dict[str, Any]:
        """Raw numbers by tool of a section's measured parts."""
        return {part.tool: part.raw for part in self.parts if part.section == section and not part.absent}

    def keep(self, part: Part, order: Sequence[tuple[str, str]]) -> None:
        """Puts a part in place of an earlier one, in the order of the card."""
        others = [old for old in self.parts if (old.section, old.tool) != (part.section, part.tool)]
        self.parts = sorted([*others, part], key=lambda kept: order.index((kept.section, kept.tool)))


def machine() -> dict[str, Any]:
    """What the numbers depend on, and nothing that changes between two calls on one machine."""
    found = fingerprint()
    return {
        "cpu": found.get("cpu", {}).get("model", platform.processor()),
        "cores": found.get("cpu", {}).get("cores_usable"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def version(tool: str) -> str:
    """Installed version of a tool's distribution, Python's for what comes with it, empty where it is not installed."""
    shipped = next((name for start, name in SHIPPED.items() if tool.startswith(start)), None)
    distribution = shipped or (tool if tool in PEERS or tool == "torch" else None)
    if distribution is None:
        return f"Python {platform.python_version()}"
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def absence(tool: str) -> str:
    """Why a tool cannot be used here, empty where it can: a peer of the list is imported to find out."""
    if tool not in PEERS:
        return "" if version(tool) else "not installed"
    try:
        importlib.import_module(PEERS[tool])
    except Exception as error:  # a peer's import runs its own code, and anything may come of that
        if not version(tool):
            return "not installed"
        first = next(iter(str(error).splitlines()), "")
        return f"cannot be imported: {type(error).__name__}: {first}"
    return ""


def page(card: Card, scores: Iterable[Score]) -> str:
    """Markdown: the machine, a table a section, then every tool with its version or the reason of its absence."""
    where = card.machine
    dates = sorted(part.measured_at[:10] for part in card.parts)
    head = (
        f"# Score card\n\nMeasured on {where['cpu']}, {where['cores']} cores, {where['system']}, "
        f"Python {where['python']}, torch {where['torch']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. "
        "[README.md](README.md) says what each section does; `score.json` holds what was measured.\n"
    )
    tools: dict[str, list[Part]] = {}
    for part in card.parts:
        tools.setdefault(part.tool, []).append(part)
    lines = ["## Tools", "", "| tool | version | sections | seconds | absent because |", "|---|---|---|---:|---|"]
    for tool, parts in tools.items():
        sections = ", ".join(part.section for part in parts if not part.absent) or "-"
        reasons = "; ".join(dict.fromkeys(part.absent for part in parts if part.absent))
        spent = sum(part.elapsed_s for part in parts)
        lines.append(f"| {tool} | {parts[0].version or '-'} | {sections} | {spent:.0f} | {reasons.replace('|', '/')} |")
    return f"{head}\n{tables(scores)}\n" + "\n".join(lines) + "\n"


def tables(scores: Iterable[Score]) -> str:
    """Markdown: a table a section, a line a tool and work, a column a quantity."""
    scores = list(scores)
    parts = []
    for section, title in TITLES.items():
        own = [score for score in scores if score.section == section]
        if not own:
            continue
        quantities = list(dict.fromkeys(score.quantity for score in own))
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


def load(path: Path) -> Card:
    """Card of an earlier call, an empty one of this machine where there is no file."""
    return msgspec.json.decode(path.read_bytes(), type=Card) if path.exists() else Card(machine=machine())
