"""Rows that may be compared: settings, and in each the curve of every method at every memory size."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ctxbench.analysis.forecast import disturbed, latency
from ctxbench.analysis.frame import SKETCH
from ctxbench.analysis.quickest import quickest
from ctxbench.errors import unknown
from ctxbench.rows import Row
from ctxbench.units import format_tokens

SHARED = ("mode", "device", "dtype", "batch_size", "d_model", "num_heads", "d_ff", "threads")
OWN = ("num_layers", "causal", "position")  # a method may prefer its own; compared only where a run sweeps them


@dataclass(frozen=True)
class Curve:
    """One impl of a method at one memory size in one setting: its measured rows by increasing length."""

    method: str
    impl: str
    memory: int | None
    params: str
    setting: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """``longformer / blocked``, with the memory size where there is one."""
        memory = "" if self.memory is None else f" (memory {format_tokens(self.memory)})"
        return f"{self.method} / {self.impl}{memory}"


def curves(rows: Iterable[Row]) -> list[Curve]:
    """All curves with a measured length; literal sketches with declared defects are none."""
    measured = [row for row in rows if row.measured and row.impl != SKETCH]
    swept = _swept(measured)
    found: dict[Any, dict[int, Row]] = defaultdict(dict)
    for row in measured:
        setting = tuple((name, getattr(row, name)) for name in (*SHARED, *swept))
        params = json.dumps(row.params, sort_keys=True, default=str)
        found[row.method, row.impl, row.memory, params, setting][row.seq_len] = row
    return [
        Curve(method, impl, memory, params, dict(setting), tuple(own[length] for length in sorted(own)))
        for (method, impl, memory, params, setting), own in found.items()
    ]


def best(found: Iterable[Curve]) -> list[Curve]:
    """Of each method, memory size and setting the impl that stands for it, see :func:`ctxbench.analysis.quickest`.

    Rows that ran beside other work decide nothing where there are others.
    """
    groups: dict[Any, list[Curve]] = defaultdict(list)
    for curve in found:
        groups[curve.method, curve.memory, curve.params, tuple(curve.setting.items())].append(curve)
    return [group[quickest({index: _times(curve) for index, curve in enumerate(group)})] for group in groups.values()]


def choose(found: list[Curve], name: str) -> list[Curve]:
    """The curves a user means by ``METHOD`` (its fastest impl) or ``METHOD/IMPL``.

    Raises:
        UserError: nothing of that name was measured.
    """
    method, _, impl = name.strip().partition("/")
    own = [curve for curve in found if curve.method == method and impl in ("", curve.impl)]
    if not own:
        names = {curve.method for curve in found} | {f"{curve.method}/{curve.impl}" for curve in found}
        raise unknown("method of this run", name.strip(), names)
    return own if impl else best(own)


def _times(curve: Curve) -> dict[int, float]:
    quiet = [row for row in curve.rows if not disturbed(row)] or list(curve.rows)
    return {row.seq_len: latency(row) for row in quiet}


def _swept(rows: list[Row]) -> list[str]:
    """Of the axes on which each method may have its own preference, those a run sweeps."""
    values: dict[tuple[str, str, str], set[Any]] = defaultdict(set)
    for row in rows:
        for name in OWN:
            values[row.method, row.impl, name].add(getattr(row, name))
    return [name for name in OWN if any(len(seen) > 1 for (_, _, own), seen in values.items() if own == name)]
