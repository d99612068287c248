"""Which method for a length, a memory limit and a use: a ranking by time with reasons, and refusals with theirs.

Time and memory decide; nothing here says how well a method models language. What was not measured is forecast and
marked as such, and a candidate whose interval reaches into that of the first is called tied with it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ctxbench.analysis.curves import curves
from ctxbench.analysis.forecast import MEASURED, UNKNOWN, Estimate, Forecaster, disturbed, fits, latency
from ctxbench.cost.model import big_o
from ctxbench.cost.roofline import Ceilings
from ctxbench.errors import UserError
from ctxbench.plan import Planned
from ctxbench.registry import Registry
from ctxbench.rows import Row, cell_of
from ctxbench.units import format_bytes, format_seconds, format_tokens

BOUNDED = ("O(1)",)
GOOD = 0.10  # an advised method is right when nothing is faster by more
FATAL = ("oom", "killed", "gate_failed")
NAMED = 4  # ties a headline names
LEAST_SHORTER = 3  # lengths below the held-out one


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One method at one memory size, by its fastest impl that stays below the limit.

    ``refusal`` is empty where it is advised; then ``reasons`` say what speaks for it and what to know. ``tied``: its
    interval overlaps that of the first. ``forecast``: nobody measured this cell.
    """

    method: str
    impl: str
    family: str
    memory: int | None
    causal: bool
    estimate: Estimate
    memory_verdict: str
    forecast: bool
    state_growth: str | None = None
    refusal: str = ""
    reasons: list[str] = []
    tied: bool = False


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The ranking, fastest first, and who is out for which reason."""

    ranked: list[Candidate]
    refused: list[Candidate]


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
    failures = _failures(rows)
    found = [_candidate(planned, forecaster, limit, streaming, failures) for planned in cells]
    admitted = [candidate for candidate in found if not candidate.refusal]
    best = _best(admitted)
    ranked = sorted(best, key=lambda candidate: candidate.estimate.latency_s or math.inf)
    named = {(candidate.method, candidate.memory) for candidate in ranked}
    refused = [c for c in found if c.refusal and (c.method, c.memory) not in named]
    first = ranked[0].estimate.high if ranked else None
    return Advice(
        ranked=[_ranked(candidate, index, ranked[0], first, limit) for index, candidate in enumerate(ranked)],
        refused=_one_each(refused),
    )


def state_growth(planned: Planned) -> str | None:
    """How the carried state grows with the length, by formula: ``O(1)``, ``O(T)``; None without a formula."""
    cell, method = planned.cell, planned.method
    try:
        cost = method.cost_of(cell.impl, cell.mode, cell.causal, cell.position, cell.params_for(method))
        return None if cost is None else big_o(cost.state_bytes)
    except Exception:  # a plug-in's formula may raise anything
        return None


def _candidate(
    planned: Planned, forecaster: Forecaster, limit: int | None, streaming: bool, failures: Mapping[Any, dict[int, Row]]
) -> Candidate:
    cell = planned.cell
    refusal = planned.reason if planned.status in ("unsupported", "error") else ""
    growth = None if refusal else state_growth(planned)
    estimate = (
        Estimate(
            cell=cell.key, method=cell.method, impl=cell.impl, mode=cell.mode, device=cell.device, dtype=cell.dtype,
            seq_len=cell.seq_len, memory=cell.memory, source=UNKNOWN, basis="not supported",
        )
        if refusal
        else forecaster.estimate(cell)
    )  # fmt: skip
    verdict = "unknown" if refusal else fits(estimate, forecaster.beside(cell), limit)
    if not refusal:
        refusal = (
            _failed(planned, failures)
            or _unbounded(streaming, growth, estimate)
            or _too_large(verdict, estimate, forecaster.beside(cell), limit)
        )
    if not refusal and estimate.latency_s is None:
        refusal = f"its time is unknown: {estimate.basis}"
    return Candidate(
        method=cell.method, impl=cell.impl, family=planned.method.family, memory=cell.memory, causal=cell.causal,
        estimate=estimate, memory_verdict=verdict, forecast=estimate.source != MEASURED, state_growth=growth,
        refusal=refusal,
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
    if verdict not in ("does not fit", "unclear"):
        return ""
    likely, reserve = (format_bytes((value or 0) + beside) for value in (estimate.peak_bytes, estimate.peak_at_most))
    if verdict == "unclear":
        return f"may not fit: {likely} likely, {reserve} to reserve, limit {format_bytes(limit)}"
    return f"does not fit: needs {likely}, limit {format_bytes(limit)}"


def _best(admitted: Sequence[Candidate]) -> list[Candidate]:
    """The fastest impl of each method and memory size; a known memory verdict wins over an unknown one."""
    groups: dict[Any, list[Candidate]] = defaultdict(list)
    for candidate in admitted:
        groups[candidate.method, candidate.memory].append(candidate)
    return [
        min(group, key=lambda c: (c.memory_verdict == "unknown", c.estimate.latency_s or math.inf))
        for group in groups.values()
    ]


def _one_each(refused: Sequence[Candidate]) -> list[Candidate]:
    """One refusal a method, memory size and reason; impls that fail for the same reason are named together."""
    groups: dict[Any, list[Candidate]] = defaultdict(list)
    for candidate in refused:
        groups[candidate.method, candidate.memory, candidate.refusal].append(candidate)
    return [msgspec.structs.replace(g[0], impl=", ".join(dict.fromkeys(c.impl for c in g))) for g in groups.values()]


def _ranked(candidate: Candidate, index: int, first: Candidate, high: float | None, limit: int | None) -> Candidate:
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
        reasons.append("its memory is unknown" if limit is not None else "no memory limit is known")
    if candidate.state_growth in BOUNDED and found.state_bytes:
        reasons.append(f"state of {format_bytes(found.state_bytes)} that stays bounded")
    elif found.state_bytes and candidate.state_growth:
        reasons.append(f"state of {format_bytes(found.state_bytes)} that grows, {candidate.state_growth}")
    return msgspec.structs.replace(candidate, tied=tied, reasons=reasons)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out question: who is fastest at this length, asked of the shorter ones. Times were measured.

    ``advised_low_s`` and ``best_high_s`` are the ends of their rows' intervals that speak for the advice.
    """

    seq_len: int
    setting: str
    advised: str
    advised_s: float
    best: str
    best_s: float
    candidates: int
    advised_low_s: float
    best_high_s: float

    @property
    def regret(self) -> float:
        """How much slower the advised method is than the best."""
        return self.advised_s / self.best_s - 1

    @property
    def shown_regret(self) -> float:
        """How much slower it is at least, by the intervals of both measurements; 0 where they overlap."""
        return max(0.0, self.advised_low_s / self.best_high_s - 1) if self.regret > 0 else 0.0


def trials(rows: Sequence[Row], registry: Registry, ceilings: Ceilings, pairs: bool = False) -> list[Trial]:
    """Ask who is fastest at each length at which at least two methods can be forecast from three shorter lengths.

    With ``pairs`` the question is asked of every two of them, else of all together.

    Raises:
        UserError: these rows hold no such length.
    """
    quiet = [row for row in rows if row.measured and not disturbed(row)]
    found = []
    for length in sorted({row.seq_len for row in quiet}):
        forecaster = Forecaster(registry, ceilings, [row for row in quiet if row.seq_len < length])
        groups: dict[str, list[tuple[Row, float]]] = defaultdict(list)
        for curve in curves(quiet):
            here = next((row for row in curve.rows if row.seq_len == length), None)
            if here is None or sum(row.seq_len < length for row in curve.rows) < LEAST_SHORTER:
                continue
            estimate = forecaster.estimate(cell_of(here))
            if estimate.latency_s is not None:
                groups[", ".join(f"{name} {value}" for name, value in curve.setting.items())].append(
                    (here, estimate.latency_s)
                )
        for setting, group in groups.items():
            methods = sorted({row.method for row, _ in group})
            questions = itertools.combinations(methods, 2) if pairs else [methods] if len(methods) > 1 else []
            for asked in questions:
                of = [(row, expected_s) for row, expected_s in group if row.method in asked]
                advised = min(of, key=lambda candidate: candidate[1])[0]
                best = min((row for row, _ in of), key=latency)
                found.append(
                    Trial(
                        seq_len=length, setting=setting, advised=cell_of(advised).label(), advised_s=latency(advised),
                        best=cell_of(best).label(), best_s=latency(best), candidates=len(of),
                        advised_low_s=_interval(advised)[0], best_high_s=_interval(best)[1],
                    )
                )  # fmt: skip
    if not found:
        noisy = sum(row.measured and disturbed(row) for row in rows)
        busy = f" ({noisy} rows ran beside other work in every process)" if noisy else ""
        raise UserError(
            f"no length can be held out{busy}\n"
            "  accepted: a run of two or more methods over at least four lengths, on a quiet machine"
        )
    return found


def _interval(row: Row) -> tuple[float, float]:
    assert row.latency_s is not None
    return row.latency_s.low, row.latency_s.high


def hit_rate(found: Sequence[Trial]) -> float:
    """Share of trials whose advised method is within 10 % of the best."""
    return float(np.mean([trial.regret <= GOOD for trial in found]))


def unrefuted(found: Sequence[Trial]) -> float:
    """Share of trials whose advised method is not shown to be slower than the best by more than 10 %."""
    return float(np.mean([trial.shown_regret <= GOOD for trial in found]))


def describe_request(cells: Sequence[Planned]) -> str:
    """``100k tokens, forward, cpu, fp32``."""
    cell = cells[0].cell
    shown = f"{cell.seq_len} tokens" if cell.seq_len % 1024 else f"{format_tokens(cell.seq_len)} tokens"
    return f"{shown}, {cell.mode}, {cell.device}, {cell.dtype}"


def headline(advice: Advice) -> str:
    """One sentence: the first, and who cannot be told apart from it."""
    if not advice.ranked:
        return "no method meets this request"
    first = advice.ranked[0]
    tied = [candidate.method for candidate in advice.ranked if candidate.tied]
    more = f" and {len(tied) - NAMED} more" if len(tied) > NAMED else ""
    time = format_seconds(first.estimate.latency_s)
    shown = f"{first.method} / {first.impl}, {time} a call"
    return shown + (f"; not told apart from it: {', '.join(tied[:NAMED])}{more}" if tied else "")
