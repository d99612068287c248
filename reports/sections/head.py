"""Title, when and where, the command, counts by status, three sentences."""

from __future__ import annotations

from typing import Any

from ctxbench.reports.palette import status_of
from ctxbench.reports.report import Report
from ctxbench.reports.summary import counts, sentences


def context(report: Report) -> dict[str, Any]:
    """What ``head.j2`` prints."""
    view = report.views[0]
    return {
        "facts": [(name, value) for name, value in _facts(report) if value],
        "command": _command(report),
        "counts": [(status_of(name), name, count) for name, count in counts(report.frame).items()],
        "total": len(report.frame),
        "sentences": sentences(view.frame),
        "sentences_of": view.label,
        "notes": [f"{run.name}: {warning}" for run in report.runs for warning in run.warnings],
    }


def _facts(report: Report) -> list[tuple[str, str]]:
    frame = report.frame
    starts = sorted(text for text in frame["started_at"] if text)
    return [
        ("Measured", starts[0][:16].replace("T", " ") if starts else _text(report.info("started_at"))),
        ("Run", ", ".join(run.name for run in report.runs)),
        ("Suite", _text(report.info("suite") or report.info("config", "suite"))),
        ("Device", _device(report)),
        ("Threads", ", ".join(str(n) for n in sorted(frame["threads"].unique()) if n)),
        ("PyTorch", _text(_find(report, "torch", "torch_version"))),
        ("Sizes", _sizes(report)),
    ]


def _device(report: Report) -> str:
    kinds = ", ".join(sorted(frame_device for frame_device in report.frame["device"].unique()))
    name = _find(report, "device_name", "gpu_name", "cpu_name", "cpu_model", "processor")
    return f"{kinds}: {_text(name)}" if name else kinds


def _find(report: Report, *names: str) -> Any:
    """The first value under one of these names, anywhere in ``run.json``."""

    def search(node: Any) -> Any:
        if isinstance(node, dict):
            for name in names:
                if isinstance(node.get(name), (str, int, float)):
                    return node[name]
            for child in node.values():
                found = search(child)
                if found is not None:
                    return found
        return None

    return search(dict(report.runs[0].info))


def _sizes(report: Report) -> str:
    parts = []
    for name in ("batch_size", "d_model", "num_heads", "num_layers", "d_ff", "dtype", "mode"):
        values = sorted(report.frame[name].unique())
        parts.append(f"{name} {', '.join(map(str, values))}")
    return " · ".join(parts)


def _command(report: Report) -> str:
    command = report.info("command") or report.info("command_line") or report.info("argv")
    return " ".join(map(str, command)) if isinstance(command, (list, tuple)) else _text(command)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, (dict, list)) else str(value)
