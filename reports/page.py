"""One self-contained HTML page from one or more run folders: works from disk, offline, and without JavaScript."""

from __future__ import annotations

import base64
import gzip
import importlib.resources
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ctxbench import __version__
from ctxbench.analysis.printable import printable
from ctxbench.analysis.runs import read_runs
from ctxbench.errors import unwritable
from ctxbench.registry import Registry, discover
from ctxbench.reports import library
from ctxbench.reports.report import Report
from ctxbench.reports.sections import (
    audit,
    carried,
    compare,
    crossovers,
    head,
    history,
    memory,
    methods,
    model,
    overview,
    protocol,
    roofline,
    table,
    tradeoffs,
)
from ctxbench.rows import encode

SECTIONS: dict[str, tuple[str, str, Any]] = {
    "compare": ("Comparison", "Comparison", compare),
    "overview": ("Overview", "Overview", overview),
    "history": ("History", "History", history),
    "model": ("Measured against the model", "Model", model),
    "carried": ("A token after a long context", "Context", carried),
    "memory": ("Memory sizes", "Memory sizes", memory),
    "roofline": ("Roofline", "Roofline", roofline),
    "tradeoffs": ("Time against memory", "Trade-offs", tradeoffs),
    "crossovers": ("Who is faster where", "Crossovers", crossovers),
    "audit": ("Claims against the rows", "Claims", audit),
    "table": ("Table", "Table", table),
    "methods": ("Methods", "Methods", methods),
    "protocol": ("Protocol and environment", "Protocol", protocol),
}  # in the order a reader asks; a section that is not always ``wanted`` says so; title, name in the bar, module


TAME, WILD = bytes.maketrans(b"<&", b",."), bytes.maketrans(b",.", b"<&")  # of base 85, what means something in HTML
SCRIPTS = ("core", "charts", "overview", "table", "controls")  # the last one starts the page


def write(
    run_folders: Sequence[Path],
    out: Path | None = None,
    title: str | None = None,
    registry: Registry | None = None,
    static: bool = False,
) -> Path:
    """Write the report of one or more runs and return its path, by default ``report.html`` in the first folder.

    ``static`` writes ``static.html``: our own markup, pictures and tables, no script and no chart library in it.
    ``registry`` supplies the cards and formulas of methods; without one, the installed methods are used. A method that
    is not installed here is reported from its rows alone.

    Raises:
        RunFolderError: a folder that is no run, is damaged, has no rows, or a file that cannot be there.
        EnvironmentUnusable: the disk is full or may not be written.
    """
    runs = read_runs(run_folders)
    path = out or runs[0].folder / ("static.html" if static else "report.html")
    name = title or f"ctxbench: {', '.join(run.name for run in runs)}"
    page = render(Report(runs, registry or discover(), name, static))
    _replace(path, page)
    return path


def render(report: Report) -> str:
    """The page as text."""
    parts = {"head": head.context(report)}
    chosen = {name: part for name, part in SECTIONS.items() if getattr(part[-1], "wanted", lambda _: True)(report)}
    parts |= {name: module.context(report) for name, (*_, module) in chosen.items()}
    template = _environment().get_template("page.j2")
    return template.render(
        title=report.title,
        sections={name: heading for name, (heading, _, _) in chosen.items()},
        brief={name: brief for name, (_, brief, _) in chosen.items()},
        version=__version__,
        css=_asset("report.css"),
        static=report.static,
        **({} if report.static else _interactive(report)),
        **parts,
    )


def _interactive(report: Report) -> dict[str, Any]:
    """Scripts, and the data they draw."""
    return {
        "scripts": [_asset(f"{name}.js") for name in SCRIPTS],
        "plotly": plotly_script(tuple(sorted(_kinds(report.figures)))),
        "figures": pack(json.dumps(_finite(report.figures), separators=(",", ":"), allow_nan=False)),
        "rows": pack(_rows(report)),
    }


def pack(text: str) -> Markup:
    """Gzip and base 85: what the page unpacks in the browser. Nothing in it can end a script element."""
    packed = base64.b85encode(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return Markup(packed.translate(TAME).decode())


def unpack(text: str) -> str:
    """What was packed, as the browser reads it."""
    return gzip.decompress(base64.b85decode(text.encode().translate(WILD))).decode()


def _kinds(figures: Mapping[str, Any]) -> set[str]:
    return {trace.get("type", "scatter") for figure in figures.values() for trace in figure["data"]}


@lru_cache(maxsize=2)
def plotly_script(kinds: tuple[str, ...] = ("scatter",)) -> Markup:
    """The installed plotly package's own library, packed, for traces of some kinds."""
    bundle = library.installed()
    return pack(bundle if set(kinds) - {"scatter"} else library.core(bundle))


def _rows(report: Report) -> str:
    """All rows as JSON lines, in the order of the frame and so of the table."""
    lines = {(run.name, row.cell): encode(row).decode() for run in report.runs for row in run.rows}
    return "".join(lines[key] for key in zip(report.frame["run"], report.frame["cell"], strict=True))


def _finite(node: Any) -> Any:
    """Numbers as JSON knows them: plain, and null where there is none."""
    if isinstance(node, dict):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value) for value in node]
    if hasattr(node, "item"):
        node = node.item()
    if isinstance(node, float):
        return float(f"{node:.6g}") if math.isfinite(node) else None
    return node


def _asset(name: str) -> Markup:
    return Markup((importlib.resources.files(__package__) / "assets" / name).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ctxbench.reports", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["broken"] = lambda name: Markup("_<wbr>").join(escape(printable(name)).split("_"))
    environment.globals["now"] = lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment


def _replace(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error, "--out FILE") from None
