"""A run in other formats: tables, pytest-benchmark's JSON, and every figure as SVG, PDF and PNG."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctxbench import __version__
from ctxbench.analysis.frame import to_frame
from ctxbench.analysis.runs import Run, read_run
from ctxbench.errors import unwritable
from ctxbench.reports import tables
from ctxbench.reports.figures import canvas
from ctxbench.reports.gallery import gallery
from ctxbench.rows import Row
from ctxbench.units import format_tokens

FORMATS = {"csv": "csv", "parquet": "parquet", "md": "md", "latex": "tex", "pytest-benchmark": "json", "figures": ""}
TEXTS: dict[str, Callable[..., str]] = {"csv": tables.to_csv, "md": tables.to_markdown, "latex": tables.to_latex}


def export(folder: Path, kind: str, out: Path | None = None) -> list[Path]:
    """Write one run in one of FORMATS and return the files; ``-`` as ``out`` is left to the caller.

    Raises:
        RunFolderError: not a run, or a path that cannot be.
        EnvironmentUnusable: Parquet without pyarrow, or the disk is full or may not be written.
    """
    run = read_run(folder)
    path = out or folder / ("figures" if kind == "figures" else f"rows.{FORMATS[kind]}")
    try:
        if kind == "figures":
            return _write_figures(run, path)
        if kind == "parquet":
            tables.to_parquet(to_frame([run]), path)
        else:
            path.write_text(text(run, kind), encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error, "--out PATH") from None
    return [path]


def text(run: Run, kind: str) -> str:
    """A run as the text of one format."""
    if kind == "pytest-benchmark":
        return json.dumps(pytest_benchmark(run), indent=1) + "\n"
    return TEXTS[kind](to_frame([run]))


def pytest_benchmark(run: Run) -> dict[str, Any]:
    """The measured cells of a run as ``pytest-benchmark compare`` reads them; other cells have no numbers there."""
    measured = [row for row in run.rows if row.measured]
    starts = sorted(row.started_at for row in measured if row.started_at)
    return {
        "machine_info": {"node": "", "machine": "", "processor": "", "python_version": "", "cpu": {}, **_machine(run)},
        "commit_info": {"id": "unknown", "time": None, "author_time": None, "dirty": False, "branch": "(unknown)"},
        "benchmarks": [_benchmark(row) for row in measured],
        "datetime": starts[0] if starts else "",
        "version": f"ctxbench {__version__}",
    }


def _machine(run: Run) -> dict[str, Any]:
    environment = run.info.get("environment")
    flat = environment if isinstance(environment, dict) else {}
    return {name: value for name, value in flat.items() if isinstance(value, (str, int, float))}


def _benchmark(row: Row) -> dict[str, Any]:
    latency = row.latency_s
    assert latency is not None
    data = sorted(value for process in latency.samples for value in process) or [latency.median]
    quarter = statistics.quantiles(data, n=4) if len(data) > 1 else [data[0]] * 3
    spread = statistics.stdev(data) if len(data) > 1 else 0.0
    mean, iqr = statistics.fmean(data), quarter[2] - quarter[0]
    inner = [value for value in data if quarter[0] - 1.5 * iqr <= value <= quarter[2] + 1.5 * iqr]
    far = sum(abs(value - mean) > spread for value in data)
    memory_size = "" if row.memory is None else f"-m{format_tokens(row.memory)}"
    name = f"{row.method}[{row.impl}-{row.mode}-{row.dtype}-{format_tokens(row.seq_len)}{memory_size}]"
    return {
        "group": f"{row.mode}, {format_tokens(row.seq_len)} tokens",
        "name": name,
        "fullname": f"{row.device}::{name}",
        "params": {"impl": row.impl, "seq_len": row.seq_len, "memory": row.memory},
        "param": None,
        "extra_info": {"cell": row.cell, "status": row.status, "warnings": row.warnings},
        "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": 1, "max_time": 0.0, "min_time": 0.0,
                    "warmup": True},
        "stats": {
            "min": data[0], "max": data[-1], "mean": mean, "stddev": spread, "rounds": len(data),
            "median": latency.median, "iqr": iqr, "q1": quarter[0], "q3": quarter[2],
            "iqr_outliers": len(data) - len(inner), "stddev_outliers": far,
            "outliers": f"{far};{len(data) - len(inner)}", "ld15iqr": inner[0], "hd15iqr": inner[-1],
            "ops": 1 / mean, "total": sum(data), "data": data, "iterations": 1,
        },
    }  # fmt: skip


def _write_figures(run: Run, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for title, figure in gallery(run):
        name = slug(title)
        for kind in ("svg", "pdf", "png"):
            path = folder / f"{name}.{kind}"
            path.write_bytes(canvas.save(figure, kind))
            written.append(path)
    return written


def slug(name: str) -> str:
    """A file name of plain characters; names that differ in other characters alone are told apart by a number."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:80]
    if re.fullmatch(r"[\w ,/=().-]*", name, re.ASCII) and len(name) <= 80:
        return plain
    import zlib

    return f"{plain}-{zlib.crc32(name.encode()):08x}"
