"""From the outcomes of a cell's child processes to its row. Nothing is measured here, and nothing is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctxbench.cost.figures import Figures
from ctxbench.cost.roofline import Ceilings, call_bound
from ctxbench.measure.statistics import summarise
from ctxbench.plan import Planned
from ctxbench.rows import Counted, Flops, Latency, PeakBytes, Row, StateBytes, row_for
from ctxbench.run.tasks import Memory, Outcome, Samples
from ctxbench.text import Warn, kind_of

PEAK_TOLERANCE = (2 * 2**20, 0.03)
CHECKSUM_TOLERANCE = 1e-2  # sums of a few output values; the order of additions may differ, garbage differs more
TOO_FAST = 0.5  # share of the calibrated bound; a noisy calibration may be somewhat low


def unmeasured_row(planned: Planned, status: str, reason: str, **fields: Any) -> Row:
    """The row of a cell that has no number: its reason, its forecast and what its formulas say."""
    warnings = [Warn.FORMULA_FAILED(planned.formula_error)] if planned.formula_error else []
    return row_for(
        planned.cell, status, reason, forecast=planned.forecast, picked=planned.picked, warnings=warnings,
        **{**_by_formula(planned.figures), **fields},
    )  # fmt: skip


def measured_row(
    planned: Planned, timed: Sequence[Outcome], memory: Outcome | None, precision: float, gated: bool,
    ceilings: Ceilings, started_at: str,
) -> Row:  # fmt: skip
    """The row of a cell whose timing processes have ended; the first of them decides whether there is a number."""
    elapsed = sum(outcome.elapsed_s for outcome in (*timed, *([memory] if memory else [])))
    first = timed[0]
    common: dict[str, Any] = {"gate": first.gate, "started_at": started_at, "elapsed_s": elapsed}
    measured = [outcome.samples for outcome in timed if outcome.samples and outcome.samples.samples]
    if first.status not in ("ok", "unstable") or not measured:
        status = first.status if first.status not in ("ok", "unstable") else "error"
        reason = first.reason or ("" if status != "error" else "the timing process delivered no sample")
        return unmeasured_row(planned, status, reason, detail=first.detail, **common)
    latency, reached = _latency(measured, precision)
    row = unmeasured_row(planned, "ok", "", **common)
    tokens = planned.cell.batch_size * (1 if planned.cell.mode == "decode" else planned.cell.seq_len)
    row.latency_s, row.tokens_per_s = latency, tokens / latency.median if latency.median > 0 else None
    joules = [samples.energy_j for samples in measured if samples.energy_j is not None]
    row.energy_j = sum(joules) / len(joules) if joules else None
    row.energy_reason = "" if joules else measured[0].energy_reason
    row.env_delta = {"processes": [samples.sensors for samples in measured]} if measured[0].sensors else {}
    row.warnings += _timing_warnings(planned, timed, measured, latency, reached, ceilings)
    if not gated:
        row.warnings.append(Warn.NO_GATE())
    if latency.n_processes < 2 or not reached:
        row.status = "unstable"
        row.reason = (
            "one process only"
            if latency.n_processes < 2
            else f"interval wider than +-{100 * precision:g} % of the median"
        )
    _add_memory(row, planned, memory)
    row.warnings = _one_of_a_kind(row.warnings)
    return row


def _latency(measured: list[Samples], precision: float) -> tuple[Latency, bool]:
    """All processes are kept; those that ran beside other work leave the median where two quiet ones are there."""
    latency, reached = summarise(measured, precision)
    quiet = [samples for samples in measured if not samples.contended]
    if 2 <= len(quiet) < len(measured):
        undisturbed, reached = summarise(quiet, precision)
        latency.median, latency.low, latency.high = undisturbed.median, undisturbed.low, undisturbed.high
        latency.cpu_median = undisturbed.cpu_median
    return latency, reached


def _by_formula(figures: Figures | None) -> dict[str, Any]:
    if figures is None:
        return {}
    return {
        "flops": Flops(algorithmic=figures.algorithmic, formula=figures.flops),
        "peak_bytes": PeakBytes(formula=figures.peak_bytes),
        "state_bytes": StateBytes(formula=figures.state_bytes),
        "num_parameters": Counted(formula=figures.num_parameters),
    }


def _timing_warnings(
    planned: Planned, timed: Sequence[Outcome], measured: list[Samples], latency: Latency, reached: bool,
    ceilings: Ceilings,
) -> list[str]:  # fmt: skip
    found = [warning for samples in measured for warning in samples.warnings]
    processes = f"of {len(measured)} processes"
    contended = sum(samples.contended for samples in measured)
    if contended:
        left_out = ", left out of the median" if len(measured) - contended >= 2 else ""
        found.append(Warn.CONTENDED(f"{contended} {processes}{left_out}"))
    if latency.n_processes < 2:
        found.append(Warn.ONE_PROCESS())
    elif not reached:
        width = (latency.high - latency.low) / 2 / latency.median
        found.append(Warn.PRECISION(f"+-{100 * width:.1f} %"))
    unsteady = sum(not samples.steady for samples in measured)
    if unsteady:
        found.append(Warn.UNSTEADY(f"{unsteady} {processes}"))
    sums = [samples.checksum for samples in measured if samples.checksum is not None]
    if sums and max(sums) - min(sums) > CHECKSUM_TOLERANCE * max(1.0, *map(abs, sums)):
        found.append(Warn.CHECKSUM(f"{min(sums):.6g} to {max(sums):.6g}"))
    failed = [outcome for outcome in timed if outcome.samples is None]
    if failed:
        found.append(
            Warn.PROCESS_FAILED(f"{len(failed)} of {len(timed)}: {failed[0].status} {failed[0].reason}".strip())
        )
    if ceilings.calibrated and planned.figures is not None:
        bound = call_bound(planned.cell, planned.figures, ceilings)
        if latency.median < TOO_FAST * bound:
            found.append(Warn.TOO_FAST(f"{latency.median:.3g} s against a bound of {bound:.3g} s"))
    return found


def _add_memory(row: Row, planned: Planned, outcome: Outcome | None) -> None:
    """Fill in what the memory process saw, and say where it contradicts the formulas."""
    if outcome is None:
        row.warnings.append(Warn.MEMORY_FAILED("the budget was spent before it ran"))
        return
    if outcome.status != "ok":
        row.warnings.append(Warn.MEMORY_FAILED(f"{outcome.status}: {outcome.reason}"))
        row.detail = row.detail or outcome.detail
    memory = outcome.memory
    if memory is None:
        return
    figures = planned.figures
    row.warnings += memory.warnings
    row.bytes_moved = memory.bytes_moved
    row.peak_bytes = PeakBytes(
        allocated=memory.allocated,
        resident=memory.resident,
        traced=memory.traced,
        formula=figures.peak_bytes if figures else None,
        agree=_agree(memory.allocated, memory.resident),
        meter=memory.meter,
    )
    row.state_bytes = StateBytes(measured=memory.state, formula=figures.state_bytes if figures else None)
    row.num_parameters = Counted(measured=memory.parameters, formula=figures.num_parameters if figures else None)
    row.flops = Flops(
        algorithmic=figures.algorithmic if figures else None,
        formula=figures.flops if figures else None,
        counted=memory.counted_flops,
        coverage=memory.coverage,
        uncounted=memory.uncounted,
    )
    if row.peak_bytes.agree is False:
        row.warnings.append(Warn.METERS_DISAGREE(f"{memory.allocated} and {memory.resident} bytes"))
    if figures is not None:
        row.warnings += _contradictions(memory, figures)


def _contradictions(memory: Memory, figures: Figures) -> list[str]:
    found = []
    if memory.counted_flops == 0 and figures.flops > 0:
        found.append(Warn.FLOPS_ZERO(f"the formula says {figures.flops}"))
    elif memory.counted_flops is not None and memory.counted_flops != figures.flops:
        found.append(Warn.FLOPS_DISAGREE(f"{memory.counted_flops} counted, {figures.flops} by formula"))
    if memory.uncounted:
        found.append(Warn.UNCOUNTED(", ".join(f"{name} x{count}" for name, count in sorted(memory.uncounted.items()))))
    if _agree(memory.allocated, figures.peak_bytes) is False:
        found.append(Warn.PEAK_FORMULA(f"{memory.allocated} measured, {figures.peak_bytes} by formula"))
    if memory.parameters is not None and memory.parameters != figures.num_parameters:
        found.append(Warn.PARAMETERS_FORMULA(f"{memory.parameters} measured, {figures.num_parameters} by formula"))
    if memory.state is not None and memory.state != figures.state_bytes:
        found.append(Warn.STATE_FORMULA(f"{memory.state} measured, {figures.state_bytes} by formula"))
    return found


def _agree(one: int | None, other: int | None) -> bool | None:
    """Whether two peaks agree within max(2 MiB, 3 %)."""
    if one is None or other is None:
        return None
    least, share = PEAK_TOLERANCE
    return abs(one - other) <= max(least, share * max(one, other))


def _one_of_a_kind(warnings: list[str]) -> list[str]:
    """Processes of one cell repeat each other's warnings: the most detailed text of each kind stays."""
    kept: dict[str, str] = {}
    for warning in warnings:
        kind = kind_of(warning)
        code = warning if kind is Warn.OTHER else kind.code
        if len(warning) > len(kept.get(code, "")):
            kept[code] = warning
    return list(kept.values())


def codes(row: Row) -> list[str]:
    """Codes of a row's warnings, for counts."""
    return [kind_of(warning).code for warning in row.warnings]
