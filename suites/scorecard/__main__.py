"""``python -m ctxbench.suites.scorecard [SECTION ...] [--out FOLDER]``: measure, print, and keep the tables."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import msgspec

from ctxbench.suites.scorecard.card import TITLES, load, tables


def main() -> int:
    """Sections measured now replace those of an earlier call in the folder."""
    parser = argparse.ArgumentParser(prog="python -m ctxbench.suites.scorecard", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(TITLES)}; all by default")
    parser.add_argument("--out", type=Path, help="folder for score.json and SCORE.md")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(TITLES))
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; accepted: {', '.join(TITLES)}")
    wanted = arguments.sections or list(TITLES)
    kept = load(arguments.out / "score.json") if arguments.out else []
    scores = [score for score in kept if score.section not in wanted]
    for section in wanted:
        found = list(importlib.import_module(f"ctxbench.suites.scorecard.{section}").scores())
        sys.stdout.write(tables(found) + "\n")
        sys.stdout.flush()
        scores += found
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            content = msgspec.json.format(msgspec.json.encode(scores), indent=1)
            (arguments.out / "score.json").write_bytes(content + b"\n")
            (arguments.out / "SCORE.md").write_text(tables(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
