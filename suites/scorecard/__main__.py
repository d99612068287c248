"""Measure what the score card lacks, or the named parts anew, and write the card after every part."""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ctxbench.suites.scorecard.card import TITLES, Card, Part, Score, absence, load, machine, page, tables, version


def main() -> int:
    """A part is one tool in one section; parts measured now replace those of an earlier call in the folder."""
    sections = {name: importlib.import_module(f"ctxbench.suites.scorecard.{name}") for name in TITLES}
    order = [(name, tool) for name, module in sections.items() for tool in module.TOOLS]
    parser = argparse.ArgumentParser(prog="python -m ctxbench.suites.scorecard", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(TITLES)}, or one tool of it as timing/asv; all by default"
    )
    parser.add_argument("--out", type=Path, help="folder for score.json and SCORE.md; its parts are not measured again")
    parser.add_argument("--for", type=float, dest="limit", metavar="SECONDS", help="begin no part after so long")
    arguments = parser.parse_args()
    path = arguments.out / "score.json" if arguments.out else None
    card = load(path) if path else Card(machine=machine())
    if card.machine != machine():
        parser.error(f"{path} is of another machine or torch\n  received: {machine()}\n  accepted: {card.machine}")
    wanted = _wanted(parser, arguments.parts, order, card)

    started, failed = time.perf_counter(), []
    for index, (name, tool) in enumerate(wanted):
        if arguments.limit is not None and time.perf_counter() - started > arguments.limit:
            sys.stdout.write(f"{len(wanted) - index} parts left; the same command goes on with them\n")
            break
        part = _measure(sections[name], name, tool, card)
        sys.stdout.write(f"{name}/{tool}: {part.absent or f'{part.elapsed_s:.0f} s'}\n")
        sys.stdout.flush()
        failed += [part] * part.absent.startswith("failed")
        card.keep(part, order)
        if path:
            _write(path, card, sections)
    sys.stdout.write(tables(_scores(card, sections)) if not path else f"{path.with_name('SCORE.md')}\n")
    return 1 if failed else 0


def _wanted(
    parser: argparse.ArgumentParser, named: list[str], order: list[tuple[str, str]], card: Card
) -> list[tuple[str, str]]:  # fmt: skip
    """Named parts, measured or not; without names those that have no numbers yet."""
    unknown = sorted(name for name in named if name not in TITLES and tuple(name.split("/", 1)) not in order)
    if unknown:
        tools = [f"{section}/{tool}" for section, tool in order]
        parser.error(f"unknown part {', '.join(unknown)}; accepted: {', '.join(TITLES)}, {', '.join(tools)}")
    if named:
        return [part for part in order if part[0] in named or "/".join(part) in named]
    done = {(part.section, part.tool) for part in card.parts if not part.absent}
    return [part for part in order if part not in done]


def _measure(module: Any, name: str, tool: str, card: Card) -> Part:
    """A tool that fails is a part with the reason: the others go on."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    part = Part(section=name, tool=tool, version=version(tool), measured_at=now, absent=absence(tool))
    if part.absent:
        return part
    started = time.perf_counter()
    try:
        part.raw = module.measure(tool, card.raws(name))
    except Exception as error:  # whatever another tool comes to
        part.absent = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    part.elapsed_s = round(time.perf_counter() - started, 1)
    return part


def _scores(card: Card, sections: dict[str, Any]) -> Iterator[Score]:
    for name, module in sections.items():
        yield from module.scores(card.raws(name))


def _write(path: Path, card: Card, sections: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n")
    path.with_name("SCORE.md").write_text(page(card, _scores(card, sections)))


if __name__ == "__main__":
    sys.exit(main())
