"""Latency against memory: which methods nobody beats in both, and how long a sequence each fits into a limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ctxbench.analysis.curves import SHARED, Curve
from ctxbench.analysis.forecast import Forecaster, disturbed, fits
from ctxbench.analysis.reserve import needed
from ctxbench.rows import Row, cell_of

FRONT, DOMINATED, UNCLEAR, DISTURBED = "front", "dominated", "unclear", "disturbed"
LONGEST = 2**30  # tokens beyond which nobody asks


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One curve at one length. ``by`` dominates it; where their time intervals overlap the verdict is unclear.

    A row that ran beside other work in every process is ``disturbed``: it neither beats nor is beaten.
    """

    label: str
    cell: str
    seq_len: int
    setting: dict[str, Any]
    latency_s: float
    low: float
    high: float
    peak_bytes: int
    verdict: str
    by: str = ""


class Frontier(msgspec.Struct, frozen=True, kw_only=True):
    """The largest length that stays below a memory limit.

    by_formula: by the forecast of what to reserve; None where no formula is known. measured: the longest measured
    length that does; 0 where the shortest does not. exceeded: the shortest measured length, or recorded out of memory,
    that does not. consistent: whether no measurement contradicts the formula.
    """

    label: str
    setting: dict[str, Any]
    limit: int
    by_formula: int | None
    measured: int
    exceeded: int | None
    consistent: bool | None


def pareto(found: Sequence[Curve], seq_len: int) -> list[Point]:
    """The points of every setting at one length, the front first, by time."""
    points: list[Point] = []
    for setting in {repr(curve.setting): curve.setting for curve in found}.values():
        rows = [
            (curve.label, row)
            for curve in found
            for row in curve.rows
            if curve.setting == setting and row.seq_len == seq_len and row.peak_bytes and row.peak_bytes.allocated
        ]
        points += [_point(label, row, rows, setting) for label, row in rows]
    order = (FRONT, UNCLEAR, DOMINATED, DISTURBED)
    return sorted(points, key=lambda point: (repr(point.setting), order.index(point.verdict), point.latency_s))


def _point(label: str, row: Row, rows: Sequence[tuple[str, Row]], setting: dict[str, Any]) -> Point:
    time, peak = row.latency_s, _peak(row)
    assert time is not None
    verdict, by = DISTURBED if disturbed(row) else FRONT, ""
    for other, rival in rows if verdict == FRONT else ():
        against = rival.latency_s
        assert against is not None
        better = (against.median, _peak(rival))
        if (
            rival is row
            or disturbed(rival)
            or not (better[0] <= time.median and better[1] <= peak and better != (time.median, peak))
        ):
            continue
        clear = against.high < time.low or (better[1] < peak and against.median <= time.low)
        if clear or verdict == FRONT:
            verdict, by = DOMINATED if clear else UNCLEAR, other
        if clear:
            break
    return Point(
        label=label, cell=row.cell, seq_len=row.seq_len, setting=setting, latency_s=time.median, low=time.low,
        high=time.high, peak_bytes=peak, verdict=verdict, by=by,
    )  # fmt: skip


def _peak(row: Row) -> int:
    assert row.peak_bytes is not None
    assert row.peak_bytes.allocated is not None
    return row.peak_bytes.allocated


def frontier(
    found: Sequence[Curve], rows: Sequence[Row], forecaster: Forecaster, limits: Sequence[int]
) -> list[Frontier]:
    """The largest length of every curve below each limit, by formula and by measurement.

    Args:
        found: the curves asked about.
        rows: all rows of the run; those that ran out of memory say what does not fit.
        forecaster: knows the formulas.
        limits: bytes of one process, runtime, parameters and inputs included.
    """
    return [_frontier(curve, rows, forecaster, limit) for curve in found for limit in limits]


def _frontier(curve: Curve, rows: Sequence[Row], forecaster: Forecaster, limit: int) -> Frontier:
    cell = cell_of(curve.rows[-1])
    fitting: list[int] = []
    above: list[int] = []
    for row in curve.rows:
        if (peak := needed(row)) is not None:
            (fitting if peak + forecaster.beside(cell_of(row)) <= limit else above).append(row.seq_len)
    series = cell.series
    above += [row.seq_len for row in rows if row.status == "oom" and cell_of(row).series == series]
    by_formula = _largest(curve, forecaster, limit)
    measured, exceeded = max(fitting, default=0), min(above, default=None)
    known = by_formula is not None and (fitting or above)
    return Frontier(
        label=curve.label, setting={name: curve.setting[name] for name in SHARED}, limit=limit, by_formula=by_formula,
        measured=measured, exceeded=exceeded,
        consistent=(exceeded is None or (by_formula or 0) < exceeded) if known else None,
    )  # fmt: skip


def _largest(curve: Curve, forecaster: Forecaster, limit: int) -> int | None:
    """The largest length that fits by formula, to one part in 64; 0 where the shortest measured one does not.

    None without a formula, even where measured lengths fit: what is not known beyond them is not a limit.
    """
    cell = cell_of(curve.rows[0])
    figures = forecaster.figures(cell)
    if figures is None or figures.peak_bytes is None:
        return None

    def fitting(length: int) -> bool | None:
        asked = msgspec.structs.replace(cell, seq_len=length)
        verdict = fits(forecaster.estimate(asked), forecaster.beside(asked), limit)
        return None if verdict == "unknown" else verdict == "fits"

    low = curve.rows[0].seq_len
    if (first := fitting(low)) is None:
        return None
    if not first:
        return 0
    high = 2 * low
    while high < LONGEST and (more := fitting(high)) is not False:
        if more is None:
            return None
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle)
    return low
