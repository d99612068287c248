"""The table at the end of a run: the fastest impl of each method and length, slopes, counts, warnings."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctxbench.cost.figures import Evaluator
from ctxbench.registry import Registry
from ctxbench.rows import FAILURES, STATUSES, Row, cell_of
from ctxbench.text import Warn, kind_of
from ctxbench.units import counted, format_seconds, format_tokens

SETTING = ("mode", "device", "dtype", "batch_size", "d_model", "num_heads", "d_ff")
NAMED = ("batch_size", "d_model", "num_heads", "d_ff")


def print_summary(rows: list[Row], registry: Registry, console: Console) -> None:
    """Print one table a setting, then what happened to all cells."""
    settings: dict[Any, list[Row]] = defaultdict(list)  # of measured rows
    for row in rows:
        if row.measured and not _is_sketch(row, registry):
            settings[tuple(getattr(row, name) for name in SETTING)].append(row)
    for measured in settings.values():
        console.print(_table(measured, len(settings) > 1, registry))
    counts = Counter(row.status for row in rows)
    shown = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    console.print(f"{counted(len(rows), 'cell')}: {', '.join(shown) or 'none'}", markup=False)
    for row in [row for row in rows if row.status in FAILURES][:10]:
        where = f"{row.method} / {row.impl} at {format_tokens(row.seq_len)}, {row.mode}"
        console.print(f"  {row.status}: {where}: {row.reason.splitlines()[0] if row.reason else ''}", markup=False)
    if rows and not settings:  # then what was not even tried is all there is to say
        refused = Counter((row.status, f"{row.method} / {row.impl}", row.reason) for row in rows if row.reason)
        for (status, whose, reason), count in refused.most_common(10):
            console.print(f"  {count} x {status}: {whose}: {reason.splitlines()[0]}", markup=False)
    kinds = Counter(kind for row in rows for kind in {kind_of(warning) for warning in row.warnings})
    for kind, count in kinds.most_common():
        if kind is not Warn.OTHER:
            console.print(f"  {count} x {kind.code}: {kind.meaning}; {kind.action}", markup=False)


def _table(measured: list[Row], several: bool, registry: Registry) -> Table:
    first = measured[0]
    title = f"Fastest impl, seconds a call; {first.mode}, {first.device}, {first.dtype}"
    if several:
        title += "".join(f", {name} {getattr(first, name)}" for name in NAMED)
    lengths = sorted({row.seq_len for row in measured})
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for length in lengths:
        table.add_column(format_tokens(length), justify="right")
    table.add_column("impl")
    table.add_column("slope (formula)", justify="right")
    evaluator = Evaluator()
    lines: dict[Any, list[Row]] = defaultdict(list)
    swept = _swept(measured)
    for row in measured:
        lines[row.method, row.memory if row.method in swept else None].append(row)
    for (name, memory), own in sorted(lines.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        best = {
            length: min((row for row in own if row.seq_len == length), key=_median)
            for length in {row.seq_len for row in own}
        }
        longest = best[max(best)]
        cells = [_cell(best.get(length), longest.impl) for length in lengths]
        slopes = _slopes([row for row in own if row.impl == longest.impl], registry, evaluator)
        label = Text(name if memory is None else f"{name} (memory {format_tokens(memory)})")
        table.add_row(label, *cells, Text(longest.impl), slopes)
    return table


def _is_sketch(row: Row, registry: Registry) -> bool:
    """Whether the impl rebuilds a sketch with its defects: fast for the wrong reasons, so never the fastest."""
    entry = registry.entries.get(row.method)
    return entry is not None and any(impl.name == row.impl and impl.defects for impl in entry.method.impls)


def _swept(measured: list[Row]) -> set[str]:
    """Methods of which more than one memory size was measured."""
    sizes: dict[str, set[int | None]] = defaultdict(set)
    for row in measured:
        sizes[row.method].add(row.memory)
    return {method for method, found in sizes.items() if len(found) > 1}


def _cell(row: Row | None, usual: str) -> Text:
    if row is None:
        return Text("-", style="dim")
    other = f"\n{row.impl}" if row.impl != usual else ""
    return Text(f"{format_seconds(_median(row))}{other}", style="yellow" if row.status == "unstable" else "")


def _slopes(series: list[Row], registry: Registry, evaluator: Evaluator) -> str:
    """Slope of log time against log length over the last two lengths, and what the FLOP formula says there."""
    ordered = sorted(series, key=lambda row: row.seq_len)
    if len(ordered) < 2 or ordered[-1].seq_len == ordered[-2].seq_len:
        return "-"
    before, last = ordered[-2:]
    slope = math.log(_median(last) / _median(before)) / math.log(last.seq_len / before.seq_len)
    formula = None
    if last.method in registry.entries:
        middle = round(math.sqrt(before.seq_len * last.seq_len))
        cell = cell_of(last)
        try:
            formula = evaluator.slope(registry[last.method], type(cell)(**{**_fields(cell), "seq_len": middle}))
        except Exception:  # a plug-in's formula may raise anything; the measured slope stands alone
            formula = None
    return f"{slope:.2f}" + (f" ({formula:.2f})" if formula is not None else "")


def _fields(cell: Any) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in cell.__struct_fields__}


def _median(row: Row) -> float:
    assert row.latency_s is not None
    return row.latency_s.median
