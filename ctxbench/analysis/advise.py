"""Which method for a length, a memory limit and a use: a ranking by time with reasons, and refusals with theirs.

Time and memory decide; nothing here says how well a method models language. What was not measured is forecast and
marked as such, and a candidate whose interval reaches into that of the first is called tied with it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ctxbench.analysis.forecast import MEASURED, UNKNOWN, Estimate, Forecaster, fits
from ctxbench.plan import Planned
from ctxbench.rows import Row, cell_of
from ctxbench.units import format_bytes, format_seconds, format_tokens

BOUNDED = ("O(1)",)
FATAL = ("oom", "killed", "gate_failed")
GOOD = 0.10  # an advised method is right when nothing is faster by more
NAMED = 4  # ties a headline names


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One method at one memory size, by its fastest impl that stays below the limit.

    ``refusal`` is empty where it is advised; then ``reasons`` say what speaks for it and what to know. ``tied``: its
    interval overlaps that of the first. ``forecast``: nobody measured this cell. ``beside_bytes`` live beside its peak:
    runtime, parameters, inputs, incoming state.
    """

    method: str
    impl: str
    family: str
    memory: int | None
    causal: bool
    estimate: Estimate
    beside_bytes: int
    memory_verdict: str
    forecast: bool
    state_growth: str | None = None
    refusal: str = ""
    reasons: list[str] = []
    tied: bool = False

    @property
    def needs(self) -> int | None:
        """Bytes that are held against the limit: what to reserve for the peak, and what lives beside it."""
        reserve = self.estimate.peak_at_most
        return None if reserve is None else reserve + self.beside_bytes


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The ranking, fastest first, and who is out for which reason."""

    ranked: list[Candidate]
    refused: list[Candidate]


class Considered(NamedTuple):
    """What is known of a cell whatever is asked: ``objection`` speaks against it at any limit.

    ``beside`` are the bytes that live beside its peak, ``growth`` how its state grows with the length.
    """

    planned: Planned
    estimate: Estimate
    beside: int
    growth: str | None
    objection: str

    def verdict(self, limit: int | None) -> str:
        """Whether it fits; see ``forecast.fits``."""
        return fits(self.estimate, self.beside, limit)


def advise(
    cells: Sequence[Planned],
    forecaster: Forecaster,
    limit: int | None,
    streaming: bool = False,
    rows: Iterable[Row] = (),
) -> Advice:
    """Rank the methods of a plan's cells, all at one length and in one mode.

    Args:
        cells: what is asked about, supported or not.
        forecaster: answers for time and memory.
        limit: bytes of one process; None where there is none.
        streaming: demand a state that stays bounded however long the stream is.
        rows: rows of the same run; those that failed speak against their series.
    """
    return rank(consider(cells, forecaster, rows), limit, streaming)


def consider(cells: Sequence[Planned], forecaster: Forecaster, rows: Iterable[Row] = ()) -> list[Considered]:
    """What is known of cells, whatever limit and use they are then ranked for."""
    failures = _failures(rows)
    return [_considered(planned, forecaster, failures) for planned in cells]


def rank(cells: Sequence[Considered], limit: int | None, streaming: bool = False) -> Advice:
    """Rank cells for a memory limit and a use; see ``advise``."""
    found = [_candidate(cell, limit, streaming) for cell in cells]
    best = _best([candidate for candidate in found if not candidate.refusal])
    ranked = sorted(best, key=lambda candidate: candidate.estimate.latency_s or math.inf)
    named = {(candidate.method, candidate.memory) for candidate in ranked}
    refused = [c for c in found if c.refusal and (c.method, c.memory) not in named]
    first = ranked[0].estimate.high if ranked else None
    return Advice(
        ranked=[_ranked(candidate, index, ranked[0], first) for index, candidate in enumerate(ranked)],
        refused=_one_each(refused),
    )


def _considered(planned: Planned, forecaster: Forecaster, failures: Mapping[Any, dict[int, Row]]) -> Considered:
    cell = planned.cell
    if planned.status in ("unsupported", "error"):
        unknown = Estimate(
            cell=cell.key, method=cell.method, impl=cell.impl, mode=cell.mode, device=cell.device, dtype=cell.dtype,
            seq_len=cell.seq_len, memory=cell.memory, source=UNKNOWN, basis="not supported",
        )  # fmt: skip
        return Considered(planned, unknown, 0, None, planned.reason)
    return Considered(
        planned, forecaster.estimate(cell), forecaster.beside(cell), forecaster.state_growth(cell),
        _failed(planned, failures),
    )  # fmt: skip


def _candidate(known: Considered, limit: int | None, streaming: bool) -> Candidate:
    cell, estimate, verdict = known.planned.cell, known.estimate, known.verdict(limit)
    refusal = (
        known.objection
        or _unbounded(streaming, known.growth, estimate)
        or _too_large(verdict, estimate, known.beside, limit)
    )
    if not refusal and estimate.latency_s is None:
        refusal = f"its time is unknown: {estimate.basis}"
    return Candidate(
        method=cell.method, impl=cell.impl, family=known.planned.method.family, memory=cell.memory, causal=cell.causal,
        estimate=estimate, beside_bytes=known.beside, memory_verdict=verdict, forecast=estimate.source != MEASURED,
        state_growth=known.growth, refusal=refusal,
    )  # fmt: skip


def _failures(rows: Iterable[Row]) -> dict[Any, dict[int, Row]]:
    found: dict[Any, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.status in FATAL:
            found[cell_of(row).series][row.seq_len] = row
    return found


def _failed(planned: Planned, failures: Mapping[Any, dict[int, Row]]) -> str:
    """What the run saw of this series: a gate that failed anywhere, or memory that ran out at or below this length."""
    for length, row in sorted(failures.get(planned.cell.series, {}).items()):
        if row.status == "gate_failed":
            return f"failed its correctness gate at {format_tokens(length)}: {row.reason.splitlines()[0]}"
        if length <= planned.cell.seq_len:
            why = "ran out of memory" if row.status == "oom" else "was killed"
            return f"{why} at {format_tokens(length)} (cell {row.cell})"
    return ""


def _unbounded(streaming: bool, growth: str | None, estimate: Estimate) -> str:
    if not streaming:
        return ""
    if growth is None:
        return "the growth of its state is unknown: it declares no formula"
    if growth in BOUNDED:
        return ""
    size = format_bytes(estimate.state_bytes)
    return f"its state grows without bound, {growth}: {size} after {format_tokens(estimate.seq_len)}"


def _too_large(verdict: str, estimate: Estimate, beside: int, limit: int | None) -> str:
    if verdict == "unknown" and limit is not None:
        shown = format_bytes(limit)
        return f"its memory is unknown: no formula and no shorter measured length says whether it stays below {shown}"
    if verdict not in ("does not fit", "unclear"):
        return ""
    likely, reserve = (format_bytes((value or 0) + beside) for value in (estimate.peak_bytes, estimate.peak_at_most))
    peak, above = f"peak {format_bytes(estimate.peak_bytes)}", f"limit {format_bytes(limit)}"
    if verdict == "unclear":
        return f"may not fit: likely needs {likely} ({peak}), {reserve} with what to reserve, {above}"
    return f"does not fit: needs {likely} ({peak}), {above}"


def _best(admitted: Sequence[Candidate]) -> list[Candidate]:
    """The fastest impl of each method and memory size."""
    groups: dict[Any, list[Candidate]] = defaultdict(list)
    for candidate in admitted:
        groups[candidate.method, candidate.memory].append(candidate)
    return [min(group, key=lambda c: c.estimate.latency_s or math.inf) for group in groups.values()]


def _one_each(refused: Sequence[Candidate]) -> list[Candidate]:
    """One refusal a method, memory size and reason; impls that fail for the same reason are named together."""
    groups: dict[Any, list[Candidate]] = defaultdict(list)
    for candidate in refused:
        groups[candidate.method, candidate.memory, candidate.refusal].append(candidate)
    return [msgspec.structs.replace(g[0], impl=", ".join(dict.fromkeys(c.impl for c in g))) for g in groups.values()]


def _ranked(candidate: Candidate, index: int, first: Candidate, high: float | None) -> Candidate:
    found = candidate.estimate
    assert found.latency_s is not None
    assert first.estimate.latency_s is not None
    tied = index > 0 and high is not None and (found.low or 0.0) <= high
    times = found.latency_s / first.estimate.latency_s
    reasons = ["fastest" if index == 0 else f"{times:.3g} times the time of {first.method}"]
    if tied:
        reasons.append("its interval overlaps that of the first")
    if not candidate.causal:
        reasons.append("bidirectional: every token sees later ones")
    reasons.append(f"{'forecast' if candidate.forecast else 'measured'}: {found.basis}")
    if candidate.memory_verdict == "unknown":
        reasons.append("no memory limit is known")
    if candidate.state_growth in BOUNDED and found.state_bytes:
        reasons.append(f"state of {format_bytes(found.state_bytes)} that stays bounded")
    elif found.state_bytes and candidate.state_growth:
        reasons.append(f"state of {format_bytes(found.state_bytes)} that grows, {candidate.state_growth}")
    return msgspec.structs.replace(candidate, tied=tied, reasons=reasons)


def describe_request(cells: Sequence[Planned]) -> str:
    """``100k tokens, forward, cpu, fp32``."""
    cell = cells[0].cell
    shown = f"{cell.seq_len} tokens" if cell.seq_len % 1024 else f"{format_tokens(cell.seq_len)} tokens"
    return f"{shown}, {cell.mode}, {cell.device}, {cell.dtype}"


def headline(advice: Advice) -> str:
    """One sentence: the first, and who cannot be told apart from it."""
    if not advice.ranked:
        unsure = [candidate for candidate in advice.refused if candidate.memory_verdict == "unclear"]
        if not unsure:
            return "no method meets this request"
        nearest = min(unsure, key=lambda candidate: candidate.estimate.peak_at_most or math.inf)
        return f"no method surely meets this request; the likeliest is {nearest.method} / {nearest.impl}"
    first = advice.ranked[0]
    tied = [candidate.method for candidate in advice.ranked if candidate.tied]
    more = f" and {len(tied) - NAMED} more" if len(tied) > NAMED else ""
    time = format_seconds(first.estimate.latency_s)
    shown = f"{first.method} / {first.impl}, {time} a call"
    return shown + (f"; not told apart from it: {', '.join(tied[:NAMED])}{more}" if tied else "")
