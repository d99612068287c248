"""Copy a finished run beside the published ones: ``python -m ctxbench.reports.publish RUN FOLDER/NAME``.

A published run is its header, its rows and the static edition of its report; ``ctxbench report FOLDER/NAME`` makes the
interactive one of it. ``FOLDER/index.html`` lists all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ctxbench.errors import CtxbenchError, RunFolderError
from ctxbench.reports.page import write

KEPT = ("run.json", "rows.jsonl")
INDEX = Environment(autoescape=True, trim_blocks=True).from_string(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ctxbench: published runs</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d5d9e0, #3a404b); --muted: light-dark(#59606c, #a2a9b5); }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#1b1f26, #e6e8ec); background: light-dark(#ffffff, #14171c); font-variant-numeric: tabular-nums; }
a { color: light-dark(#2450c8, #9db8ff); }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, .label { color: var(--muted); font-weight: normal; } .label { display: none; } td { overflow-wrap: anywhere; }
.date, .link { white-space: nowrap; }
@media (max-width: 40rem) {
  thead { display: none; } tr, td { display: block; } tr { border-bottom: 1px solid var(--line); padding: .6rem 0; }
  td { border: 0; padding: .1rem 0; } .label { display: inline-block; min-width: 6rem; } .link { font-weight: 600; }
}
</style>
</head>
<body>
<h1>Published runs</h1>
<p>Pages of pictures and tables; <code>ctxbench report NAME</code>, in this folder, makes the interactive one.</p>
<table>
<thead><tr><th scope="col">run</th><th scope="col">processor</th><th scope="col">measured</th><th scope="col">cells</th>
<th scope="col">command</th></tr></thead>
<tbody>
{% for run in runs %}
<tr><td class="link"><a href="{{ run.name }}/static.html">{{ run.name }}</a></td>
<td><span class="label">processor</span>{{ run.processor }}</td>
<td class="date"><span class="label">measured</span>{{ run.date }}</td>
<td><span class="label">cells</span>{{ run.cells }}</td>
<td><span class="label">command</span><code>{{ run.command }}</code></td></tr>
{% endfor %}
</tbody>
</table>
</body>
</html>
"""
)


def publish(run: Path, target: Path) -> Path:
    """Copy the run, write its static page and the list of all runs beside it; returns the list's path.

    Raises:
        RunFolderError: where the run is not finished, damaged, or was written to a place of its own, whose path its
            header would tell.
    """
    try:
        header = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{run} is not a run: {error}\n  accepted: a folder with {' and '.join(KEPT)}") from None
    if header.get("status") != "finished":
        raise RunFolderError(f"{run} is {header.get('status')}\n  finish it first: ctxbench run --resume {run}")
    if re.search(r"(^|[\s=,])[/~]", header["command"]):
        raise RunFolderError(
            f"{run} was made by a command with an absolute path\n  received: {header['command']}\n  accepted: one "
            "that works on every machine; run it without --out, or with a relative path"
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run / name, target / name)
    write([target], title=f"ctxbench: {target.name}", static=True)
    index = target.parent / "index.html"
    index.write_text(INDEX.render(runs=_published(target.parent)), encoding="utf-8")
    return index


def _published(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*/run.json")):
        header = json.loads(path.read_text(encoding="utf-8"))
        counts = ", ".join(f"{count} {status}" for status, count in header["counts"].items())
        found.append(
            {
                "name": path.parent.name,
                "processor": header["environment"]["cpu"]["model"],
                "date": header.get("created_at", "")[:10],
                "cells": counts,
                "command": header["command"],
            }
        )
    return found


def main() -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m ctxbench.reports.publish", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    try:
        sys.stdout.write(f"{publish(arguments.run, arguments.target)}\n")
    except CtxbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
