"""How the numbers were made, every warning, and the machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ctxbench import __version__
from ctxbench.reports.report import Report
from ctxbench.rows import SCHEMA
from ctxbench.text import explain, kind_of
from ctxbench.units import format_tokens


def context(report: Report) -> dict[str, Any]:
    """What ``protocol.j2`` prints."""
    return {
        "warnings": _warnings(report),
        "environment": [(run.name, list(flat(run.info))) for run in report.runs],
        "schema": SCHEMA,
        "version": __version__,
        "elapsed_s": float(report.frame["elapsed_s"].sum()),
    }


def _warnings(report: Report) -> list[dict[str, Any]]:
    """Warnings of all rows, equal kinds together, with the cells they concern."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in (row for run in report.runs for row in run.rows):
        for warning in row.warnings:
            kind = kind_of(warning)
            entry = kinds.setdefault(kind.code, {"code": kind.code, "meaning": kind.meaning, "action": kind.action,
                                                 "count": 0, "cells": []})  # fmt: skip
            entry["count"] += 1
            if len(entry["cells"]) < 40:
                entry["cells"].append(f"{row.method} / {row.impl} at {format_tokens(row.seq_len)}: {explain(warning)}")
    return sorted(kinds.values(), key=lambda entry: -int(entry["count"]))


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested object as dotted names and texts; long lists become one line of JSON."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        text = node if isinstance(node, str) else json.dumps(node, default=str)
        yield prefix, text if len(text) <= 2000 else text[:2000] + " \u2026"
