"""Title, when and where, the command, counts by status, three sentences."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ctxbench.analysis.frame import MEASURED
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
        "notes": [*(f"{run.name}: {warning}" for run in report.runs for warning in run.warnings), *_doubts(report)],
    }


def _doubts(report: Report) -> list[str]:
    """What a reader must know before believing the numbers."""
    unstable = report.frame[report.frame["status"] == "unstable"]
    measured = int(report.frame["status"].isin(MEASURED).sum())
    notes = []
    if len(unstable):
        why = (
            unstable["reason"]
            .str.partition("\n")[0]
            .str.replace("+-", "\u00b1")
            .replace("", "no reason was kept")
            .value_counts()
        )
        shown = "; ".join(f"{count}: {reason}" for reason, count in list(why.items())[:3])
        more = f"; and {int(why.iloc[3:].sum())} for other reasons" if len(why) > 3 else ""
        notes.append(
            f"{len(unstable)} of {measured} measured cells did not reach the precision asked for ({shown}{more})."
        )
    depths = report.frame.groupby("method")["num_layers"]
    layers = {str(method): tuple(sorted(set(column))) for method, column in depths}
    usual = Counter(layers.values()).most_common(1)[0][0]
    other = [f"{method} has {' and '.join(map(str, own))}" for method, own in layers.items() if own != usual]
    if other:
        notes.append(f"Methods differ in depth: {', '.join(other)} layers, all others {' and '.join(map(str, usual))}.")
    return notes


def _facts(report: Report) -> list[tuple[str, str]]:
    frame = report.frame
    starts = sorted(text for text in frame["started_at"] if text)
    return [
        ("Measured", starts[0][:16].replace("T", " ") if starts else _text(report.info("created_at"))),
        ("Run", ", ".join(run.name for run in report.runs)),
        ("Suite", _text(report.info("suite"))),
        ("Device", _device(report)),
        ("Threads", _threads(report)),
        ("PyTorch", _text(report.info("versions", "torch"))),
        ("Sizes", _sizes(report)),
    ]


def _device(report: Report) -> str:
    kinds = ", ".join(sorted(report.frame["device"].unique()))
    gpus = report.info("environment", "gpu")
    names = {_text(gpu.get("name")) for gpu in gpus if isinstance(gpu, dict)} if isinstance(gpus, list) else set()
    on_cpu = set(report.frame["device"]) == {"cpu"}
    name = _text(report.info("environment", "cpu", "model")) if on_cpu else ", ".join(sorted(names))
    return f"{kinds}: {name}" if name else kinds


def _threads(report: Report) -> str:
    """Threads of the measuring processes; 0 in a row stands for all usable cores."""
    cores = _text(report.info("environment", "cpu", "cores_usable"))
    counts = [
        str(n) if n else f"all{f' {cores}' if cores else ''} cores" for n in sorted(report.frame["threads"].unique())
    ]
    return ", ".join(counts)


def _sizes(report: Report) -> str:
    parts = []
    for name in ("batch_size", "d_model", "num_heads", "num_layers", "d_ff", "dtype", "mode"):
        values = sorted(report.frame[name].unique())
        parts.append(f"{name} {', '.join(map(str, values))}")
    return " · ".join(parts)


def _command(report: Report) -> str:
    command = report.info("command")
    return " ".join(map(str, command)) if isinstance(command, (list, tuple)) else _text(command)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, (dict, list)) else str(value)
