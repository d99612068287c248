"""What the charts over the length draw: measured points, forecasts, and a reason for every missing one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ctxbench.analysis.frame import MEASURED, records
from ctxbench.reports.figures import scales
from ctxbench.reports.palette import status_of
from ctxbench.units import counted, format_tokens

COLUMNS = ["series", "method", "impl", "seq_len", "kind", "value", "low", "high", "status", "reason", "hover"]


@dataclass(frozen=True)
class Metric:
    """A quantity over the length. ``measured`` and ``expected`` are columns, the first that has a value counts.

    ``exact``: a value from ``expected`` is as good as a measurement, so that the point is not missing.
    """

    key: str
    title: str
    note: str
    unit: str
    measured: tuple[str, ...]
    expected: tuple[str, ...]
    interval: tuple[str, str] | None = None
    forecast_interval: tuple[str, str] | None = None
    exact: bool = False


LATENCY = Metric(
    "latency", "Latency", "time per call, median and interval", "s", ("latency_s",), ("forecast_s",),
    ("latency_low_s", "latency_high_s"), ("forecast_low_s", "forecast_high_s"),
)  # fmt: skip
MEMORY = Metric(
    "memory", "Peak memory", "above weights and inputs", "B", ("peak_allocated", "peak_resident"),
    ("peak_traced", "peak_formula", "forecast_peak_bytes"),
)  # fmt: skip
FLOPS = Metric(
    "flops", "FLOPs", "executed per call", "FLOP", ("flops_counted",),
    ("flops_formula", "flops_algorithmic"), exact=True,
)  # fmt: skip
ABREAST = 3  # symbols side by side in the strip
METRICS = (LATENCY, MEMORY, FLOPS)
SOURCES = {
    "peak_allocated": "allocator", "peak_resident": "resident set", "peak_traced": "traced", "peak_formula": "formula",
    "forecast_peak_bytes": "forecast", "forecast_s": "forecast", "flops_counted": "counted",
    "flops_formula": "formula", "flops_algorithmic": "algorithmic", "latency_s": "median",
}  # fmt: skip


def points(frame: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """One line a point; ``kind`` is measured, forecast or missing. A missing point may have a forecast as well."""
    found: list[dict[str, Any]] = []
    for row in records(frame.sort_values(["series", "seq_len"])):
        base = {name: row[name] for name in ("series", "method", "impl", "seq_len", "status", "reason")}
        source, value = _first(row, metric.measured)
        if value is not None and (metric.exact or row["status"] in MEASURED):
            low, high = _bounds(row, metric.interval, value)
            found.append({**base, "kind": "measured", "value": value, "low": low, "high": high,
                          "hover": _measured_text(row, metric, source, value, low, high)})  # fmt: skip
            continue
        source, value = _first(row, metric.expected)
        if value is not None:
            low, high = _bounds(row, metric.forecast_interval, value)
            found.append({**base, "kind": "forecast", "value": value, "low": low, "high": high,
                          "hover": _forecast_text(row, metric, source, value)})  # fmt: skip
        if value is None or not metric.exact:
            found.append({**base, "kind": "missing", "value": None, "low": None, "high": None,
                          "hover": _missing_text(row)})  # fmt: skip
    return pd.DataFrame(found, columns=COLUMNS).astype({"value": float, "low": float, "high": float})


def stacks(table: pd.DataFrame) -> dict[tuple[str, int], tuple[float, int]]:
    """Where the strip above a chart has the symbol of a missing point, by series and length: ``(shift, row)``.

    At every length the symbols stand in a block, :data:`ABREAST` in a row; ``shift`` is in columns from its middle.
    """
    places: dict[tuple[str, int], tuple[float, int]] = {}
    missing = table[table["kind"] == "missing"]
    for _, here in missing.groupby("seq_len", sort=False):
        length = int(here["seq_len"].iloc[0])
        columns = min(ABREAST, here["series"].nunique())
        for index, series in enumerate(dict.fromkeys(here["series"])):
            places[str(series), length] = (index % columns - (columns - 1) / 2, index // columns)
    return places


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, float | None]:
    for column in columns:
        value = row[column]
        if not pd.isna(value) and value > 0:
            return column, float(value)
    return "", None


def _bounds(row: Mapping[str, Any], columns: tuple[str, str] | None, value: float) -> tuple[float, float]:
    if columns is None or any(pd.isna(row[column]) for column in columns):
        return value, value
    return min(float(row[columns[0]]), value), max(float(row[columns[1]]), value)


def _head(row: Mapping[str, Any]) -> str:
    memory = "" if pd.isna(row["memory"]) else f", memory {format_tokens(int(row['memory']))}"
    return f"{row['series']} at {format_tokens(int(row['seq_len']))} tokens{memory}"


def _measured_text(row: Mapping[str, Any], metric: Metric, source: str, value: float, low: float, high: float) -> str:
    lines = [_head(row), f"{scales.text(value, metric.unit)} ({SOURCES[source]})"]
    if low < value or high > value:
        lines.append(f"interval {scales.text(low, metric.unit)} to {scales.text(high, metric.unit)}")
    if metric is LATENCY:
        lines.append(f"{counted(row['n_samples'], 'sample')} in {counted(row['n_processes'], 'process')}")
        if row["stop"]:
            lines.append(f"sampling ended by {row['stop']}")
    if metric is MEMORY and row["meter"]:
        lines.append(f"meter: {row['meter']}")
    if row["status"] != "ok":
        lines.append(status_of(row["status"]).words + (f": {row['reason']}" if row["reason"] else ""))
    return "\n".join(lines)


def _forecast_text(row: Mapping[str, Any], metric: Metric, source: str, value: float) -> str:
    words = f"{scales.text(value, metric.unit)} by {SOURCES[source]}, not measured"
    return "\n".join((_head(row), words, _why(row)))


def _missing_text(row: Mapping[str, Any]) -> str:
    return "\n".join((_head(row), "not measured", _why(row)))


def _why(row: Mapping[str, Any]) -> str:
    if row["status"] in MEASURED:
        return "no meter gave a value"
    return status_of(row["status"]).words + (f": {row['reason']}" if row["reason"] else "")
