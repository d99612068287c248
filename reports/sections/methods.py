"""A card for every method: idea, paper, parameters, deviations, audited claims, implementations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ctxbench.analysis import reach
from ctxbench.analysis.reach import ReachMap
from ctxbench.method import Method
from ctxbench.reports.figures import reach as figure
from ctxbench.reports.palette import status_of
from ctxbench.reports.report import Report
from ctxbench.reports.swatch import swatch
from ctxbench.units import counted


def context(report: Report) -> dict[str, Any]:
    """What ``methods.j2`` prints."""
    maps: dict[str, ReachMap] = {}
    for run in report.runs:
        maps = reach.read(run.folder) | maps
    cards = []
    for name, rows in report.frame.groupby("method", sort=True):
        method = report.method(str(name))
        cards.append({
            "name": name, "title": (method.title if method else "") or name, "method": method,
            "swatch": swatch(report.styles[str(name)]), "params": _params(method, rows), "impls": _impls(method, rows),
            "reach": _reach(maps.get(str(name))),
            "link": paper_link(method.paper.link) if method and method.paper else "",
        })  # fmt: skip
    return {"cards": cards, "broken": report.registry.broken, "drawn": bool(maps), "run": report.runs[0].name}


def _reach(found: ReachMap | None) -> dict[str, Any] | None:
    """The picture of a method's reach with what its colours stand for and the sizes it was drawn at."""
    if found is None:
        return None
    counts = found.counts()
    key = [(state, words) for state, words in figure.WORDS.items() if counts[state]]
    sizes = [f"{name} = {value}" for name, value in found.params.items()]
    layers = found.dims.get("num_layers", 1)
    note = f"{counted(found.seq_len, 'token')}, {counted(layers, 'layer')}, in {found.impl}"
    return {"svg": figure.svg(found), "key": key, "note": ", ".join([note, *sizes])}


def paper_link(link: str) -> str:
    """The address of a paper, empty for anything that is not an arXiv number, a DOI or an https address."""
    if link.startswith("arXiv:"):
        return f"https://arxiv.org/abs/{link.removeprefix('arXiv:')}"
    if link.startswith("doi:"):
        return f"https://doi.org/{link.removeprefix('doi:')}"
    return link if link.startswith("https://") else ""


def _params(method: Method | None, rows: pd.DataFrame) -> list[dict[str, str]]:
    """Parameters with the values of this run; unit and meaning where the method is installed."""
    values: dict[str, list[Any]] = {}
    for text in rows["params"].drop_duplicates():
        for name, value in json.loads(text).items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    specs = {spec.name: spec.metadata for spec in dataclasses.fields(method.params)} if method else {}
    used = []
    for name, found in values.items():
        meta: Mapping[str, Any] = specs.get(name, {})
        role = " (memory size)" if method and name == method.memory_parameter else ""
        used.append({"name": name, "value": ", ".join(map(str, found)), "unit": meta.get("unit", ""),
                     "help": meta.get("help", "") + role, "source": meta.get("source", "")})  # fmt: skip
    return used


def _impls(method: Method | None, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Implementations with what became of their cells, in the method's own order."""
    declared = {impl.name: impl for impl in method.impls} if method else {}
    found = []
    for name in dict.fromkeys([*declared, *rows["impl"]]):
        mine, impl = rows[rows["impl"] == name], declared.get(name)
        counts = [f"{count} {status_of(str(status)).words}" for status, count in mine["status"].value_counts().items()]
        reasons = list(dict.fromkeys(text for text in mine.loc[mine["status"] == "unsupported", "reason"] if text))
        found.append({
            "name": name, "note": impl.note if impl else "", "outcome": "; ".join(counts) or "not in this run",
            "reasons": reasons, "defects": dict(impl.defects) if impl else {},
            "needs": ", ".join(impl.needs) if impl else "",
        })  # fmt: skip
    return found
