"""The audit of a run: what its rows counted, traced and timed against what the formulas in them say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from ctxbench.analysis.audit import (
    FAILS,
    FLOPS_GROWTH,
    HOLDS,
    NOT_APPLICABLE,
    NOT_CLAIMED,
    PEAK_GROWTH,
    PEAK_SHARE,
    PEAK_SLACK,
    TIME_GROWTH,
    VIOLATED,
    Verdict,
    judge_growth,
)  # fmt: skip
from ctxbench.analysis.frame import SKETCH
from ctxbench.analysis.slopes import local_slopes
from ctxbench.cell import Cell
from ctxbench.method import Method
from ctxbench.rows import Gate, Row, cell_of
from ctxbench.units import format_tokens

if TYPE_CHECKING:
    from ctxbench.cost import Cost

PROBES = {
    "output": "shapes", "fresh": "fresh outputs", "agreement": "agreement of impls", "causality": "causality",
    "batch_independence": "batch independence", "receptive_field": "receptive field", "state": "state and streaming",
}  # fmt: skip
HALF = 0.5  # of a power of T: a time may grow so much faster than the work, because caches are left behind
STEPS = 2  # neighbouring pairs of lengths that must all grow too fast, so that one bad point does not
FAR = 10**15  # tokens at which the highest power of a formula is all that is left of it


def audit_rows(rows: Sequence[Row], methods: Mapping[str, Method] | None = None) -> list[Verdict]:
    """One verdict a term of every method, impl and mode in the rows.

    Args:
        rows: of one run or of several on one machine.
        methods: installed methods by name. Where a method is known, the highest power of its formula bounds its
            growth; where it is not, the values of the formula in the rows do.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.impl, row.mode), []).append(row)
    formulas = {method: _Formulas((methods or {}).get(method)) for method, _, _ in groups}
    found = []
    for (method, impl, mode), mine in sorted(groups.items()):
        start = Verdict(method=method, impl=impl, mode=mode, term="", verdict=NOT_APPLICABLE)
        found += _counts(start, mine)
        found += _probes(start, mine)
        found += _growths(start, mine, formulas[method])
    return found


def _counts(start: Verdict, rows: Sequence[Row]) -> list[Verdict]:
    """Numbers that must equal their formula in every row."""

    def exact(seen: int, formula: int) -> bool:
        return seen == formula

    def near(seen: int, formula: int) -> bool:
        return abs(seen - formula) <= max(PEAK_SLACK, PEAK_SHARE * formula)

    def both(part: Any, seen: str) -> tuple[int | None, int | None]:
        return (getattr(part, seen), part.formula) if part else (None, None)

    return [
        _compare(start, "FLOPs", rows, lambda row: both(row.flops, "counted"), exact),
        _needed(start, rows),
        _compare(start, "peak memory, traced", rows, lambda row: both(row.peak_bytes, "traced"), near),
        _compare(start, "peak memory, allocated", rows, lambda row: both(row.peak_bytes, "allocated"), near),
        _meters(start, rows),
        _compare(start, "state bytes", rows, lambda row: both(row.state_bytes, "measured"), exact),
        _compare(start, "parameters", rows, lambda row: both(row.num_parameters, "measured"), exact),
    ]


def _compare(
    start: Verdict, term: str, rows: Sequence[Row], read: Callable[[Row], tuple[int | None, int | None]],
    agrees: Callable[[int, int], bool],
) -> Verdict:  # fmt: skip
    """The row that is farthest from its formula speaks for all."""
    pairs = [(*read(row), row) for row in rows]
    both = [(seen, formula, row) for seen, formula, row in pairs if seen is not None and formula is not None]
    if not both:
        unclaimed = any(seen is not None for seen, _, _ in pairs)
        reason = "no formula is declared" if unclaimed else "no row has the count"
        return replace(start, term=term, verdict=NOT_CLAIMED if unclaimed else NOT_APPLICABLE, evidence=reason)
    wrong = [pair for pair in both if not agrees(*pair[:2])]
    seen, formula, row = max(
        wrong or both, key=lambda pair: (abs(pair[0] - pair[1]) / max(pair[1], 1), pair[2].seq_len)
    )
    error = f"{seen / formula - 1:+.2%}" if formula else "the formula is 0"
    return replace(
        start, term=term, verdict=VIOLATED if wrong else HOLDS, claimed=f"{formula:,}", seen=f"{seen:,}",
        evidence=f"{len(both) - len(wrong)} of {len(both)} cells agree; the farthest, {_cell(row)}: {error}",
    )  # fmt: skip


def _needed(start: Verdict, rows: Sequence[Row]) -> Verdict:
    """No impl can execute less than the mathematics needs, unless it computes something else."""
    term = "algorithmic FLOPs"
    if start.impl == SKETCH:
        return replace(start, term=term, evidence="a literal sketch computes something else")
    pairs = [(row.flops.counted, row.flops.algorithmic, row) for row in rows if row.flops]
    both = [(seen, needed, row) for seen, needed, row in pairs if seen is not None and needed is not None]
    if not both:
        return replace(start, term=term, evidence="no row has both numbers")
    seen, needed, row = min(both, key=lambda pair: (pair[0] / max(pair[1], 1), -pair[2].seq_len))
    less = sum(seen < needed for seen, needed, _ in both)
    return replace(
        start, term=term, verdict=VIOLATED if less else HOLDS, claimed=f"{needed:,} needed", seen=f"{seen:,} counted",
        evidence=f"{len(both) - less} of {len(both)} cells execute at least that; the closest is {_cell(row)}",
    )  # fmt: skip


def _meters(start: Verdict, rows: Sequence[Row]) -> Verdict:
    """Resident memory beside the allocator's own count: a math library's scratch may explain a difference."""
    term, both = "peak memory, resident", [row for row in rows if row.peak_bytes and row.peak_bytes.agree is not None]
    if not both:
        return replace(start, term=term, evidence="no row has both meters")
    apart = [row for row in both if row.peak_bytes and not row.peak_bytes.agree]
    evidence = f"{len(both) - len(apart)} of {len(both)} cells agree with the allocator"
    if not apart:
        return replace(start, term=term, verdict=HOLDS, evidence=evidence)
    row = max(apart, key=lambda each: each.seq_len)
    peak = row.peak_bytes
    assert peak is not None
    return replace(
        start, term=term, verdict=NOT_APPLICABLE, claimed=f"{peak.allocated or 0:,}", seen=f"{peak.resident or 0:,}",
        evidence=f"{evidence}; the longest that does not is {_cell(row)}. Scratch memory of a math library passes the "
        "allocator, so this contradicts no formula",
    )  # fmt: skip


def _probes(start: Verdict, rows: Sequence[Row]) -> list[Verdict]:
    """Each probe of the gate; what an ``as_written`` impl fails as declared is no contradiction."""
    found = []
    for probe, term in PROBES.items():
        named = replace(start, term=term)
        results = [(row, row.gate, row.gate.probes[probe]) for row in rows if row.gate and probe in row.gate.probes]
        complaints = [(row, said) for row, gate, result in results for said in _complaints(gate, probe, result)]
        count = {each: sum(result == each for _, _, result in results) for each in ("passed", "failed", "not claimed")}
        if complaints:
            row, said = complaints[0]
            seen = f"failed in {len(complaints)} of {len(results)} cells"
            verdict = replace(named, verdict=VIOLATED, claimed="passes", seen=seen, evidence=f"{_cell(row)}: {said}")
        elif count["failed"]:
            evidence = f"declared as a defect; {count['failed']} of {len(results)} cells fail so"
            verdict = replace(named, verdict=HOLDS, claimed=FAILS, seen=FAILS, evidence=evidence)
        elif count["passed"]:
            evidence = f"the gate's probe passed in {count['passed']} of {len(results)} cells"
            verdict = replace(named, verdict=HOLDS, claimed="passes", seen="passes", evidence=evidence)
        elif results:
            verdict = replace(named, verdict=NOT_CLAIMED, evidence=results[0][1].message)
        else:
            verdict = replace(named, evidence="the gate did not run")
        found.append(verdict)
    return found


def _complaints(gate: Gate, probe: str, result: str) -> list[str]:
    """What the gate says against one probe; a declared defect that is there is none, one that is absent is."""
    if gate.ok:
        return []
    named = [line.strip() for line in gate.message.splitlines() if line.strip().startswith(f"{probe}:")]
    if not named and probe == "output" and result == "failed":
        return gate.message.splitlines()[:1]
    return named[:1]


def _growths(start: Verdict, rows: Sequence[Row], formulas: _Formulas) -> list[Verdict]:
    """Counted FLOPs, peaks and times against the declared growth; the worst of several series speaks."""
    series = _series(rows)
    return [
        _worst(replace(start, term=FLOPS_GROWTH), [_flops_growth(each, formulas) for each in series]),
        _worst(replace(start, term=PEAK_GROWTH), [_peak_growth(each, formulas) for each in series]),
        _worst(replace(start, term=TIME_GROWTH), [_time_growth(each, formulas) for each in series]),
    ]


Judged = tuple[str, str, str, str]  # verdict, claimed, seen, evidence


def _worst(start: Verdict, judged: Iterable[Judged]) -> Verdict:
    order = (VIOLATED, HOLDS, NOT_CLAIMED, NOT_APPLICABLE)
    verdict, claimed, seen, evidence = min(judged, key=lambda each: order.index(each[0]))
    return replace(start, verdict=verdict, claimed=claimed, seen=seen, evidence=evidence)


def _series(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the length, shortest first; the last row of a cell counts."""
    found: dict[bytes, dict[int, Row]] = {}
    for row in rows:
        key = _identity(row)
        found.setdefault(key, {})[row.seq_len] = row
    return [[each[length] for length in sorted(each)] for each in found.values()]


def _identity(row: Row) -> bytes:
    plain = msgspec.to_builtins(cell_of(row))
    return msgspec.json.encode({name: value for name, value in plain.items() if name != "seq_len"}, order="sorted")


def _flops_growth(rows: Sequence[Row], formulas: _Formulas) -> Judged:
    counted = {row.seq_len: row.flops for row in rows if row.flops and row.flops.counted is not None}
    formula = {n: flops.formula for n, flops in counted.items() if flops.formula is not None}
    if len(formula) < len(counted) or not counted:
        return NOT_CLAIMED if counted else NOT_APPLICABLE, "", "", "no formula in the rows" if counted else "no counts"
    limit = formulas.limit(rows[-1], "flops")
    return judge_growth(list(formula), [counted[n].counted or 0 for n in formula], list(formula.values()), limit)  # type: ignore[arg-type]


def _peak_growth(rows: Sequence[Row], formulas: _Formulas) -> Judged:
    """The traced peak, or where there is none the allocator's, against the formula of the peak, else of the work."""
    for meter in ("traced", "allocated"):
        seen = {row.seq_len: getattr(row.peak_bytes, meter) for row in rows if row.peak_bytes}
        seen = {n: value for n, value in seen.items() if value}
        if len(seen) > 1:
            break
    else:
        return NOT_APPLICABLE, "", "", "fewer than two lengths with a peak"
    peaks = {row.seq_len: row.peak_bytes.formula for row in rows if row.peak_bytes}
    work = {row.seq_len: row.flops.formula for row in rows if row.flops}
    for basis, values in (("peak_bytes", peaks), ("flops", work)):
        if all(values.get(n) is not None for n in seen):
            limit = formulas.limit(rows[-1], basis)
            if basis == "flops":
                fastest = formulas.fastest_term(rows[-1], list(seen))
                if fastest is None:
                    return NOT_CLAIMED, "", "", "no formula for the peak, and the terms of the work are not known here"
                limit = max(limit, fastest)
            judged = judge_growth(list(seen), list(seen.values()), [values[n] or 0 for n in seen], limit)
            return (*judged[:3], f"{meter}, {judged[3]}")
    return NOT_CLAIMED, "", "", "no formula in the rows"


def _time_growth(rows: Sequence[Row], formulas: _Formulas) -> Judged:
    """Measured local slopes against the formula's: violated where the last ones all exceed it by half a power."""
    measured = [row for row in rows if row.measured and row.latency_s and row.latency_s.median > 0]
    if len(measured) <= STEPS:
        return NOT_APPLICABLE, "", "", f"fewer than {STEPS + 1} measured lengths"
    work = [row.flops.formula if row.flops else None for row in measured]
    if not all(work):
        return NOT_CLAIMED, "", "", "no formula for the work"
    lengths, times = [row.seq_len for row in measured], [row.latency_s for row in measured if row.latency_s]
    seen = local_slopes(
        lengths, [t.median for t in times], [t.low or t.median for t in times], [t.high for t in times]
    )[-STEPS:]
    formula = local_slopes(lengths, [float(value or 0) for value in work])[-STEPS:]
    last = measured[-1]
    limit = max(formulas.limit(last, "flops"), formulas.fastest_term(last, lengths) or 0.0)
    excess = [step.low - max(limit, said.value) for step, said in zip(seen, formula, strict=True)]
    claimed = " ".join(f"T^{said.value:.2f}" for said in formula)
    shown = " ".join(f"T^{step.value:.2f}" for step in seen)
    spans = " to ".join(format_tokens(n) for n in lengths[-STEPS - 1 :])
    intervals = ", ".join(f"{step.low:.2f} to {step.high:.2f}" for step in seen)
    evidence = f"{spans}; slopes lie within {intervals}"
    return (VIOLATED if min(excess) > HALF else HOLDS), claimed, shown, evidence


class _Formulas:
    """The formulas of one method, built once for each structure they take; they bound nothing where it is unknown."""

    def __init__(self, method: Method | None):
        self.method = method
        self._built: dict[Any, Cost | None] = {}

    def limit(self, row: Row, name: str) -> float:
        """Slope of a formula where its highest power is alone; 0 where there is no such formula."""
        from ctxbench.cost.model import local_slope, total

        cost, values = self._of(cell_of(row))
        if cost is None:
            return 0.0
        formula = total(cost.flops) if name == "flops" else cost.peak_bytes
        return 0.0 if formula is None else local_slope(formula, {**values, "T": FAR})

    def fastest_term(self, row: Row, lengths: Sequence[int]) -> float | None:
        """Slope of the fastest growing term of the work at the two longest lengths; None where it is unknown."""
        from ctxbench.cost.model import local_slope

        cost, values = self._of(cell_of(row))
        if cost is None:
            return None
        last = sorted(lengths)[-2:]
        return max((local_slope(term, {**values, "T": n}) for term in cost.flops.values() for n in last), default=0.0)

    def _of(self, cell: Cell) -> tuple[Cost | None, dict[str, Any]]:
        """The formulas of a cell and the values of their letters."""
        if self.method is None or self.method.cost is None:
            return None, {}
        from ctxbench.cost import symbols
        from ctxbench.cost.model import local_slope, total

        try:  # a plug-in's own code, perhaps of another version than the run's: then the rows speak alone
            params = cell.params_for(self.method)
            values = symbols.bindings(cell.dims, params, cell.itemsize, self.method.segment_len(params))
            key = (cell.impl, cell.mode, cell.causal, cell.position, params)
            if key not in self._built:
                cost = self.method.cost_of(*key)
                if cost is not None:
                    local_slope(total(cost.flops), values)
                self._built[key] = cost
            return self._built[key], values
        except Exception:
            return None, {}


def _cell(row: Row) -> str:
    memory = "" if row.memory is None else f", memory {format_tokens(row.memory)}"
    return f"{row.cell} at {format_tokens(row.seq_len)}{memory}"
