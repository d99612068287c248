"""Rows as a pandas frame, and its split into views: one view is what one chart can show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctxbench.analysis.printable import printable
from ctxbench.analysis.quickest import quickest
from ctxbench.analysis.runs import Run
from ctxbench.rows import Row
from ctxbench.units import format_tokens

if TYPE_CHECKING:
    import pandas as pd

IDENTITY = (
    "method", "impl", "mode", "device", "dtype", "batch_size", "seq_len", "d_model", "num_heads", "num_layers",
    "d_ff", "causal", "position", "memory", "threads",
)  # fmt: skip
VIEW_AXES = (
    "run", "mode", "device", "dtype", "batch_size", "d_model", "num_heads", "num_layers", "d_ff", "causal",
    "position", "threads", "memory",
)  # fmt: skip
COUNTS = (
    "peak_allocated", "peak_resident", "peak_traced", "peak_formula", "state_measured", "state_formula",
    "parameters_measured", "parameters_formula", "flops_algorithmic", "flops_formula", "flops_counted",
    "bytes_moved", "forecast_peak_bytes", "memory",
)  # fmt: skip
SKETCH = "as_written"  # the impl that rebuilds a source's sketch, defects included
MEASURED = ("ok", "unstable")


@dataclass(frozen=True)
class View:
    """Rows that differ in method, impl and length alone; ``values`` are the axes in which views differ."""

    values: dict[str, Any]
    frame: pd.DataFrame

    @property
    def label(self) -> str:
        """``mode forward, memory 512``; empty where there is only one view."""
        return ", ".join(f"{name} {_show(name, value)}" for name, value in self.values.items())


def flatten(row: Row, run: str = "") -> dict[str, Any]:
    """One row as flat columns; units are in the names, absent numbers are None."""
    latency, peak, flops, forecast, gate = row.latency_s, row.peak_bytes, row.flops, row.forecast, row.gate
    state, parameters = row.state_bytes, row.num_parameters
    return {
        "run": run,
        "cell": row.cell,
        "status": row.status,
        "reason": row.reason,
        **{name: getattr(row, name) for name in IDENTITY},
        "params": json.dumps(row.params, sort_keys=True, default=str),
        "latency_s": latency.median if latency else None,
        "latency_low_s": latency.low if latency else None,
        "latency_high_s": latency.high if latency else None,
        "cpu_s": latency.cpu_median if latency else None,
        "n_samples": sum(map(len, latency.samples)) if latency else 0,
        "n_processes": latency.n_processes if latency else 0,
        "stop": _counted(latency.stop) if latency else "",
        "tokens_per_s": row.tokens_per_s,
        "peak_allocated": peak.allocated if peak else None,
        "peak_resident": peak.resident if peak else None,
        "meter": peak.meter if peak else "",
        "peak_traced": peak.traced if peak else None,
        "peak_formula": peak.formula if peak else None,
        "state_measured": state.measured if state else None,
        "state_formula": state.formula if state else None,
        "parameters_measured": parameters.measured if parameters else None,
        "parameters_formula": parameters.formula if parameters else None,
        "flops_algorithmic": flops.algorithmic if flops else None,
        "flops_formula": flops.formula if flops else None,
        "flops_counted": flops.counted if flops else None,
        "bytes_moved": row.bytes_moved,
        "energy_j": row.energy_j,
        "gate_ok": gate.ok if gate else None,
        "gate_error": gate.error if gate else None,
        "gate_tolerance": gate.tolerance if gate else None,
        "forecast_s": forecast.latency_s if forecast else None,
        "forecast_low_s": forecast.low if forecast else None,
        "forecast_high_s": forecast.high if forecast else None,
        "forecast_peak_bytes": forecast.peak_bytes if forecast else None,
        "warnings": "; ".join(row.warnings),
        "started_at": row.started_at,
        "elapsed_s": row.elapsed_s,
    }


def _counted(stop: Sequence[str]) -> str:
    """Which rules ended sampling, with the number of processes each: ``2 x precision, 1 x budget``."""
    counts = Counter(stop)
    return ", ".join(name if len(stop) == 1 else f"{count} x {name}" for name, count in counts.items())


def to_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """All rows of all runs, ordered by method, impl, memory and length; counts are nullable integers.

    ``series`` names what one line of a chart is: ``method / impl``, with the parameters in which lines differ.
    """
    import pandas as pd

    # As objects first: pandas would read counts beside a None as floats, which are not exact above 2^53.
    frame = pd.DataFrame([flatten(row, run.name) for run in runs for row in run.rows], dtype=object)
    frame = frame.astype({**dict.fromkeys(COUNTS, "Int64"), "gate_ok": "boolean"}).infer_objects()
    floats = ["latency_s", "latency_low_s", "latency_high_s", "cpu_s", "tokens_per_s", "energy_j", "gate_error"]
    floats += ["gate_tolerance", "forecast_s", "forecast_low_s", "forecast_high_s"]
    frame[floats] = frame[floats].astype(float)
    frame.insert(0, "series", _series(frame))
    order = ["run", "method", "impl", "mode", "dtype", "memory", "seq_len", "series"]
    return frame.sort_values(order, kind="stable", ignore_index=True)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as plain objects."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def views(frame: pd.DataFrame, across_memory: bool = False) -> list[View]:
    """Split a frame into views, the one with the most measurements first.

    An axis separates views only where one method takes several of its values; a method that has one memory size, or
    none, appears in the views of every memory size. ``across_memory`` keeps the memory sizes together.
    """
    import pandas as pd

    axes = [axis for axis in VIEW_AXES if not (across_memory and axis == "memory")]
    groups = frame.groupby(["method", "impl"], sort=False)
    varying = [axis for axis in axes if (groups[axis].nunique(dropna=False) > 1).any()]
    if not varying:
        return [View({}, frame)]
    sizes = groups["memory"].transform(lambda column: column.nunique(dropna=False))
    found = []
    keys = frame[sizes > 1] if "memory" in varying else frame
    for values in keys[varying].drop_duplicates().itertuples(index=False, name=None):
        chosen = pd.Series(True, index=frame.index)
        for axis, value in zip(varying, values, strict=True):
            here = frame[axis].isna() if pd.isna(value) else (frame[axis] == value).fillna(False).astype(bool)
            chosen &= here | (sizes == 1) if axis == "memory" else here
        plain = [None if pd.isna(value) else value.item() if hasattr(value, "item") else value for value in values]
        found.append(View(dict(zip(varying, plain, strict=True)), frame.loc[chosen]))
    return sorted(found, key=lambda view: -int(view.frame["status"].isin(MEASURED).sum()))


def fastest(view: pd.DataFrame) -> dict[str, str]:
    """The series that stands for each method, the quickest of its impls; see :func:`ctxbench.analysis.quickest`.

    A literal sketch with declared defects computes something else: it counts only where there is nothing but it. Of a
    method without a measurement it is the first series.
    """
    sketched, right = dict[str, dict[str, dict[int, float]]](), dict[str, dict[str, dict[int, float]]]()
    columns = ["method", "impl", "series", "seq_len", "status", "latency_s"]
    for method, impl, series, length, status, seconds in view[columns].itertuples(index=False, name=None):
        group = sketched if impl == SKETCH else right
        times = group.setdefault(method, {}).setdefault(series, {})
        if status in MEASURED and seconds > 0:
            times[length] = min(seconds, times.get(length, seconds))
    chosen = {}
    for method in sorted({*right, *sketched}):
        known = right.get(method) or sketched[method]
        measured = {series: times for series, times in known.items() if times}
        chosen[method] = quickest(measured) if measured else next(iter(known))
    return chosen


def _series(frame: pd.DataFrame) -> list[str]:
    """``method / impl``, followed by the parameters that vary within it beyond the memory size."""
    settings = [json.loads(text) for text in frame["params"]]
    same: dict[tuple[str, ...], list[int]] = {}  # rows that may differ in parameters alone
    for index, row in enumerate(frame[["method", "impl", "seq_len", *VIEW_AXES]].itertuples(index=False)):
        same.setdefault(tuple(map(repr, row)), []).append(index)
    varying: dict[tuple[str, str], set[str]] = {}
    for indices in same.values():
        group = [settings[index] for index in indices]
        names = {name for params in group for name in params if len({repr(p.get(name)) for p in group}) > 1}
        pair = (str(frame.at[indices[0], "method"]), str(frame.at[indices[0], "impl"]))
        varying.setdefault(pair, set()).update(names)
    labels = []
    for method, impl, params in zip(frame["method"], frame["impl"], settings, strict=True):
        extra = ", ".join(f"{name}={params.get(name)}" for name in sorted(varying[method, impl]))
        labels.append(printable(f"{method} / {impl}" + (f" ({extra})" if extra else "")))
    return labels


def _show(name: str, value: Any) -> str:
    if name == "memory":
        return f"{format_tokens(int(value))} tokens" if isinstance(value, int) else "none"
    if name == "causal":
        return "yes" if value else "no"
    return str(value)
