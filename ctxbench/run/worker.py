"""What happens inside one measuring child: a task in, an outcome out. Needs torch."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from ctxbench import registry, workload
from ctxbench.cell import Cell
from ctxbench.cost import trace as tracer
from ctxbench.errors import MeasurementError
from ctxbench.measure import contention, drift, energy, flops, latency, machine, memory, telemetry
from ctxbench.measure.gate import run_gate
from ctxbench.measure.statistics import is_bimodal, robust_cv
from ctxbench.method import Method
from ctxbench.rows import Gate
from ctxbench.run.failures import is_out_of_memory, of_exception
from ctxbench.run.tasks import Calibration, Memory, Outcome, Samples, Task
from ctxbench.text import Warn
from ctxbench.workload import Workload

SHORT_CALL_S = 1e-4
RECHECK_S = 0.2  # longer calls are not made again with an overwritten input; the gate did that at a small size
SPREAD = 0.10
COUNT_S = 5.0  # longer calls are not repeated to count what the tracer could not
WARM_UP_TOKENS = 1024  # and at most a quarter of the sequence
CHECKED_VALUES = 64  # of an output, for its checksum


def run_task(task: Task) -> Outcome:
    """Do one task; whatever is raised becomes an outcome. Never raises."""
    started = time.monotonic()
    try:
        _be_on(task.cell)
        outcome = KINDS[task.kind](task)
    except BaseException as error:  # a plug-in may raise anything, SystemExit included
        outcome = of_exception(error)
    outcome.elapsed_s = time.monotonic() - started
    return outcome


def time_cell(task: Task) -> Outcome:
    """Gate when asked, build, warm up, sample, and look whether the outputs were really computed."""
    cell, method = _subject(task)
    gate = run_gate(method, cell, task.protocol.seed, task.passed) if task.gate else None
    if gate is not None and not gate.ok:
        return Outcome(status="gate_failed", reason=gate.message, gate=gate)
    gc.collect()
    started = time.perf_counter()
    work = _prepare(method, cell, task)
    built = time.perf_counter() - started
    outputs = _Outputs(work, repeat=task.gate)
    reference, beat = drift.reference_pair(cell.device), drift.beat(cell.device)
    sensors = contention.read()
    stopwatch = latency.stopwatch_for(cell.device)
    with telemetry.clock_watch(cell.device) as slow:
        timing = latency.measure(work.call, task.protocol, stopwatch, outputs.add, slow, beat)
    seen, contended = contention.between(sensors, contention.read())
    seen |= telemetry.snapshot(cell.device)
    if timing.discarded:
        seen["discarded_samples"] = timing.discarded
    seen |= drift.between(reference, drift.reference_pair(cell.device))
    if timing.beats:
        seen["reference_beside_s"] = [[taken, float(f"{seconds:.5g}")] for taken, seconds in timing.beats]
    median = sorted(timing.samples)[len(timing.samples) // 2]
    repeatable = "state" not in method.impl(cell.impl).defects
    complaint = outputs.complaint() or _recompute(work, outputs, repeatable, short=median <= RECHECK_S)
    if complaint:
        return Outcome(status="gate_failed", reason=complaint, gate=_refused(gate, complaint))
    counter, reason = energy.counter_for(cell.device)
    joules = energy.measure(work.call, counter, _settle(cell.device)) if counter else None
    samples = Samples(
        samples=timing.samples,
        cpu=timing.cpu,
        warmup=timing.warmup,
        stop=timing.stop,
        steady=timing.steady,
        set_up_s=built + (timing.warmup or timing.samples)[0],
        faults_per_call=timing.faults_per_call,
        contended=contended,
        sensors=seen,
        energy_j=joules,
        energy_reason=reason,
        checksum=outputs.first,
        warnings=_timing_warnings(timing, task, seen["drift"]),
    )
    if isinstance(stopwatch, latency.CudaStopwatch):
        seen["wall_median_s"] = sorted(stopwatch.wall)[len(stopwatch.wall) // 2]
    return Outcome(status="ok", gate=gate, samples=samples)


def measure_memory(task: Task) -> Outcome:
    """Both peaks of one call, the state, the parameters, and what the tracer sees."""
    cell, method = _subject(task)
    params = cell.params_for(method)
    found = Memory()
    trace = _trace_into(found, method, task)
    _warm_small(method, cell)
    work = _prepare(method, cell, task)
    peak = memory.measure(work.call, cell.device, work.forget_gradients, task.expected_s)
    found.allocated, found.resident, found.meter = peak.allocated, peak.resident, peak.meter
    found.parameters = workload.num_parameters(work.module)
    if peak.reason:
        found.warnings.append(Warn.OTHER(peak.reason))
    elif cell.device == "cpu" and memory.agree(peak.allocated, peak.resident) is False:
        found.warnings.append(Warn.METERS_DISAGREE())
    if cell.mode in ("stream", "decode"):
        work.state = None
        found.state = workload.state_bytes(work.module.state_at(cell.batch_size, cell.seq_len))  # type: ignore[operator]
    if trace.untraceable and (task.expected_s or 0.0) <= COUNT_S:
        work = workload.prepare(method, cell.dims, params, cell.impl, cell.mode, cell.dtype, cell.device, rotate=1)
        trace = flops.count_real(work)
        found.counted_flops, found.coverage = trace.flops, trace.coverage
        found.uncounted, found.bytes_moved = trace.uncounted, trace.bytes_moved
    return Outcome(status="ok", memory=found)


def trace_cell(task: Task) -> Outcome:
    """What the fake-tensor tracer alone can tell, without memory or arithmetic."""
    _, method = _subject(task)
    found = Memory(meter="tracer")
    _trace_into(found, method, task)
    return Outcome(status="ok", memory=found)


def calibrate(task: Task) -> Outcome:
    """Matmul and copy ceilings of this machine with the run's threads."""
    device = task.cell.device if task.cell else "cpu"
    threads = _set_threads(task.cell)
    rates, copied = machine.ceilings(device)
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    return Outcome(
        status="ok",
        calibration=Calibration(
            matmul_flops_per_s=rates, copy_bytes_per_s=copied, threads=threads, device=device, measured_at=moment
        ),
    )


def environment(task: Task) -> Outcome:
    """Torch's own view of the machine and of its build."""
    _set_threads(task.cell)
    return Outcome(status="ok", environment=machine.torch_view(task.cell.device if task.cell else "cpu"))


KINDS: dict[str, Callable[[Task], Outcome]] = {
    "time": time_cell,
    "memory": measure_memory,
    "trace": trace_cell,
    "calibrate": calibrate,
    "environment": environment,
}


class _Outputs:
    """What the calls returned: a few values of each, summed; and where ``repeat`` asks, whether the first came again.

    For that the whole first output is kept, and compared with what the same input gives while samples are taken.
    """

    def __init__(self, work: Workload, repeat: bool = False):
        self.work, self.repeat = work, repeat
        self.values: list[float] = []  # equal for equal inputs, different for different ones
        self.kept: torch.Tensor | None = None
        self.repeated: bool | None = None  # None until the first input was met again

    def add(self, y: torch.Tensor) -> None:
        y = y.detach()
        flat = y.reshape(-1)
        self.values.append(float(flat[:: max(1, flat.numel() // CHECKED_VALUES)].double().sum()))
        if not self.repeat or self.repeated is not None or (self.work.count - 1) % len(self.work.inputs):
            return
        if self.kept is None:
            self.kept = y.clone()
        else:
            tolerance = 100 * torch.finfo(y.dtype).eps * float(self.kept.abs().max())
            self.repeated = float((y - self.kept).abs().max()) <= tolerance

    @property
    def first(self) -> float | None:
        """Checksum of the first input's output, which all replicates share."""
        return self.values[0] if self.values and math.isfinite(self.values[0]) else None

    def complaint(self) -> str:
        """What is wrong with the outputs of the timed calls, or nothing."""
        if not all(map(math.isfinite, self.values)):
            return "a timed call returned NaN or infinite values\n  accepted: finite values"
        different = self.values[: len(self.work.inputs)]
        if len(different) > 1 and len(set(different)) < len(different):
            return (
                "timed calls on different inputs returned the same output\n  accepted: an output computed from the "
                "input of the call\n  look for results that are kept between calls"
            )
        return ""


def _subject(task: Task) -> tuple[Cell, Method]:
    if task.cell is None:
        raise MeasurementError(f"a task of kind {task.kind!r} needs a cell")
    _set_threads(task.cell)
    return task.cell, registry.reload(task.origin)


def _be_on(cell: Cell | None) -> None:
    """Make the cell's device the current one: events, synchronisation and recordings are of that, whatever tensors."""
    if cell is not None and cell.device.startswith("cuda:") and torch.cuda.is_available():
        torch.cuda.set_device(cell.device)


def _set_threads(cell: Cell | None) -> int:
    if cell is not None and cell.threads:
        torch.set_num_threads(cell.threads)
    return torch.get_num_threads()


def _prepare(method: Method, cell: Cell, task: Task) -> Workload:
    """Build the cell. Replicates share the weights and the first input, and differ in the others."""
    work = workload.prepare(
        method, cell.dims, cell.params_for(method), cell.impl, cell.mode, cell.dtype, cell.device, task.protocol.seed
    )
    torch.manual_seed(task.protocol.seed + 2 + task.process)
    with torch.no_grad():
        for x in work.inputs[1:]:
            x.normal_()
    return work


def _recompute(work: Workload, outputs: _Outputs, repeatable: bool, short: bool) -> str:
    """Give the module new contents in a tensor it has seen: an output kept by address or shape shows here.

    ``repeatable`` is False for a sketch that declares its state a defect: the same input may give another result. Calls
    that are not ``short`` are not made again; what the samples met of the first input is judged all the same.
    """
    first = outputs.kept
    if short and first is not None:
        if outputs.repeated is None:  # too few samples to come back to the first input
            work.count = 0
            outputs.add(work.call())
        with torch.no_grad():
            work.inputs[0].neg_()
        work.count = 0
        if torch.equal(first, work.call().detach()):
            return (
                "a timed output did not change when its input was overwritten\n  accepted: an output computed from the "
                "input of the call\n  look for results that are kept between calls"
            )
    if repeatable and outputs.repeated is False:
        return (
            "a timed output could not be computed again: the same input gave another result\n  accepted: equal outputs "
            "for equal inputs\n  look for tensors kept on the module, randomness, uninitialised memory"
        )
    return ""


def _refused(gate: Gate | None, message: str) -> Gate:
    probes = {**(gate.probes if gate else {}), "fresh": "failed"}
    return Gate(ok=False, probes=probes, message=message, length=gate.length if gate else None)


def _settle(device: str) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.startswith("cuda") else (lambda: None)


def _timing_warnings(timing: latency.Timing, task: Task, drifted: dict[str, float]) -> list[str]:
    samples, warnings = timing.samples, []
    if not timing.steady:
        warnings.append(Warn.UNSTEADY())
    if timing.stop in ("n=1", "cap"):
        warnings.append(Warn.FEW_SAMPLES(f"n={len(samples)}"))
    if sorted(samples)[len(samples) // 2] < SHORT_CALL_S:
        warnings.append(Warn.SHORT_CALLS())
    if is_bimodal(samples):
        warnings.append(Warn.BIMODAL())
    elif len(samples) > 4 and robust_cv(samples) > SPREAD:
        warnings.append(Warn.SPREAD(f"{100 * robust_cv(samples):.0f} % in process {task.process}"))
    if timing.throttled:
        warnings.append(Warn.THROTTLED())
    if drifted:
        changes = " and ".join(f"{kernel} {100 * change:+.0f} %" for kernel, change in drifted.items())
        warnings.append(Warn.DRIFT(f"time of {changes} in process {task.process}"))
    return warnings


def _trace_into(found: Memory, method: Method, task: Task) -> Any:
    """Fill in the tracer's figures; an impl it cannot follow leaves them empty and says so."""
    cell = task.cell
    assert cell is not None
    subject = (cell.dims, method, cell.params_for(method), cell.impl, cell.mode, cell.dtype)
    if task.engine:
        tracer.trust(task.engine, *subject)
    trace = flops.count(
        method, cell.dims, cell.params_for(method), cell.impl, cell.mode, cell.dtype, cell.device
    )  # fmt: skip
    found.engine = tracer.engine(*subject)
    if trace.untraceable:
        found.warnings.append(Warn.UNTRACEABLE(trace.untraceable))
        return trace
    found.traced, found.counted_flops, found.coverage = trace.peak_bytes, trace.flops, trace.coverage
    found.uncounted, found.bytes_moved = trace.uncounted, trace.bytes_moved
    found.parameters, found.state = trace.num_parameters, trace.state_bytes
    return trace


def _warm_small(method: Method, cell: Cell) -> None:
    """Load code pages and library buffers with a shorter sequence; skipped where the method has no shorter one."""
    _warm_libraries(cell)
    dims = cell.dims.replace(seq_len=max(1, min(WARM_UP_TOKENS, cell.seq_len // 4)), batch_size=1)
    params = cell.params_for(method)
    impl = method.impl(cell.impl)
    if not method.mode_support(cell.mode, dims, params):
        return
    if not method.impl_support(impl, cell.mode, dims, params, cell.device, cell.dtype):
        return
    try:
        workload.prepare(method, dims, params, cell.impl, cell.mode, cell.dtype, cell.device, rotate=1).call()
    except Exception as error:  # what a shorter length does is not what was asked; the real call speaks for itself
        if is_out_of_memory(error):
            raise
    gc.collect()


def _warm_libraries(cell: Cell) -> None:
    """Start the threads, and have products of the cell's widths take the buffers that libraries then keep.

    A quarter of a short sequence is too little for that: the peak of a small cell would hold what a process takes once.
    """
    dtype = workload.DTYPES[cell.dtype]
    x = torch.ones(WARM_UP_TOKENS, cell.d_model, dtype=dtype, device=cell.device)
    weight = torch.ones(4 * cell.d_model, cell.d_model, dtype=dtype, device=cell.device)
    torch.nn.functional.linear(torch.nn.functional.linear(x, weight), weight.T.contiguous()).softmax(-1).mean(0)
