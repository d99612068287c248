"""One task in, one outcome out: every fault of a plug-in has its status and says what was wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxbench.cell import Cell
from ctxbench.measure import drift, energy, latency, machine
from ctxbench.run.tasks import Outcome, Protocol, Task
from ctxbench.run.worker import KINDS, run_task

PLUGIN = """
import torch
from torch import nn
from ctxbench.method import Method

class Layer(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear, self.kept = nn.Linear(d_model, d_model), {}

    def forward(self, x):
        {body}

def build(dims, params, impl, device, dtype):
    {build}
    return Layer(dims.d_model).to(device, dtype)

METHOD = Method(name="planted", build=build)
"""
SOUND = "return self.linear(x)"
QUICK = Protocol(min_samples=3, sample_budget_s=0.01)
ORIGIN = "ctxbench.implementations.dense"


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path):
    def run(body: str = SOUND, build: str = "pass", kind: str = "time", gate: bool = True, **fields: Any) -> Outcome:
        plugin = tmp_path / "planted.py"
        plugin.write_text(PLUGIN.replace("{body}", body).replace("{build}", build))
        sizes = {"seq_len": 40, "d_model": 16, "num_heads": 2, "d_ff": 0, "threads": 1, **fields}
        cell = Cell(method="planted", impl="reference", **sizes)
        return run_task(Task(kind=kind, cell=cell, origin=f"plugin:{plugin}", protocol=QUICK, gate=gate))

    return run


def dense(kind: str, **fields: Any) -> Outcome:
    sizes = {"impl": "blocked", "seq_len": 64, "d_model": 32, "num_heads": 2, "d_ff": 64, "threads": 1, **fields}
    return run_task(Task(kind=kind, cell=Cell(method="dense", **sizes), origin=ORIGIN, protocol=QUICK, gate=True))


@pytest.mark.parametrize("mode", ["forward", "train", "stream", "decode"])
def test_a_sound_method_is_timed_in_every_mode(mode: str):
    outcome = dense("time", mode=mode)
    assert outcome.status == "ok", outcome
    assert outcome.gate.ok
    seen = outcome.samples
    assert len(seen.samples) == len(seen.cpu) >= 3
    assert seen.stop
    assert seen.set_up_s > 0
    assert math.isfinite(seen.checksum)
    assert seen.energy_j is not None or seen.energy_reason


@pytest.mark.parametrize("mode", ["forward", "train", "stream", "decode"])
def test_memory_and_counters_are_measured_in_every_mode(mode: str):
    outcome = dense("memory", mode=mode)
    assert outcome.status == "ok", outcome
    seen = outcome.memory
    assert seen.allocated > 0
    assert seen.counted_flops > 0
    assert seen.coverage == 1.0
    assert seen.parameters == 4 * (32 * 32 + 32) + 2 * 64 + 2 * 32 * 64 + 64 + 32
    assert seen.state == (2 * 64 * 32 * 4 if mode in ("stream", "decode") else None)


def test_the_tracer_alone_measures_nothing():
    seen = dense("trace", seq_len=4096).memory
    assert (seen.allocated, seen.resident) == (None, None)
    assert seen.traced > 0
    assert seen.counted_flops > 0


def test_replicates_share_the_first_input_and_the_weights():
    tasks = [Task(kind="time", cell=Cell(method="dense", impl="blocked", seq_len=32, d_model=32, threads=1),
                  origin=ORIGIN, protocol=QUICK, process=process) for process in (0, 1)]  # fmt: skip
    first, second = (run_task(task).samples.checksum for task in tasks)
    assert first == second


@pytest.mark.parametrize(
    ("planted", "status", "words"),
    [
        ({"build": "raise ValueError('planted in build')"}, "error", "planted in build"),
        ({"body": "raise ValueError('planted in forward')"}, "error", "planted in forward"),
        ({"body": "return self.missing(x)"}, "error", "missing"),
        ({"body": "return self.linear(x)[:, :-1]"}, "gate_failed", "accepted: (2, 40, 16)"),
        ({"body": "return self.linear(x).double()"}, "gate_failed", "torch.float64"),
        ({"body": "return self.linear(x) * float('nan')"}, "gate_failed", "NaN"),
        ({"body": "return self.linear(x) / 0"}, "gate_failed", "infinite"),
        ({"body": "return 'text'"}, "gate_failed", "str"),
        ({"body": "return self.linear(x) + x.mean(0)"}, "gate_failed", "batch"),
        ({"build": "raise SystemExit(2)"}, "error", "exit(2)"),
        ({"build": "raise MemoryError"}, "oom", "allocation failed"),
    ],
    ids=["build", "forward", "attribute", "shape", "dtype", "nan", "infinite", "type", "batch", "exit", "memory"],
)
def test_a_fault_has_its_status_and_its_words(run, planted, status, words):
    outcome = run(**planted)
    assert (outcome.status, words in outcome.reason) == (status, True), outcome
    assert outcome.samples is None
    assert (outcome.gate is None) == (status != "gate_failed")


def test_an_error_names_the_line_of_the_plug_in(run):
    outcome = run("return x @ x")
    assert "planted.py" in outcome.reason
    assert "`return x @ x`" in outcome.reason
    assert "x [2, 40, 16]" in outcome.reason


def test_an_output_kept_by_shape_never_gets_a_number(run):
    body = "return self.kept.setdefault(x.shape, self.linear(x))"
    assert run(body, gate=True).status == "gate_failed"
    late = run(body, gate=False)
    assert late.status == "gate_failed"
    assert "different inputs returned the same output" in late.reason


def test_an_output_kept_by_address_never_gets_a_number(run):
    body = "return self.kept.setdefault(x.data_ptr(), self.linear(x)) if x.shape[0] == 1 else self.linear(x)"
    outcome = run(body)
    assert outcome.status == "gate_failed"
    assert "overwritten" in outcome.reason
    assert outcome.gate.probes["fresh"] == "failed"


def test_a_module_that_drifts_from_call_to_call_never_gets_a_number(run):
    body = "self.n = getattr(self, 'n', 0) + (x.shape[0] == 1); return self.linear(x) + 0.1 * self.n"
    outcome = run(body)
    assert outcome.status == "gate_failed"
    assert "could not be computed again" in outcome.reason


def test_nan_that_only_appears_while_timing_is_found_without_a_gate(run):
    outcome = run("return self.linear(x) * float('nan')", gate=False)
    assert outcome.status == "gate_failed"
    assert "NaN" in outcome.reason


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"params": {"slots": 3}}, "no parameter 'slots'"), ({"d_model": 15}, "multiple of num_heads")],
    ids=["unknown parameter", "impossible width"],
)
def test_a_cell_that_cannot_be_is_an_error(run, fields, words):
    outcome = run(**fields)
    assert (outcome.status, words in outcome.reason) == ("error", True), outcome


def test_a_plug_in_that_is_gone_is_an_error_without_a_traceback_in_its_reason():
    cell = Cell(method="gone", impl="reference", seq_len=8)
    outcome = run_task(Task(kind="time", cell=cell, origin="plugin:no/such/plugin.py"))
    assert outcome.status == "error"
    assert "no plug-in at 'no/such/plugin.py'" in outcome.reason


def test_a_task_without_a_cell_is_an_error():
    assert "needs a cell" in run_task(Task(kind="time")).reason


def test_the_machine_s_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "SIZES", {"cpu": 64})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 2**16})
    outcome = run_task(Task(kind="calibrate"))
    assert outcome.status == "ok", outcome
    assert set(outcome.calibration.matmul_flops_per_s) == {"fp32", "bf16", "fp64"}
    assert all(rate > 0 for rate in outcome.calibration.matmul_flops_per_s.values())
    assert outcome.calibration.copy_bytes_per_s > 0


def test_the_device_of_a_cell_is_the_current_one(monkeypatch):
    """Events and recordings are of the current device; of another one a stopwatch would see nothing."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setitem(KINDS, "time", lambda task: Outcome(status="ok"))
    for device in ("cpu", "cuda:1"):
        cell = Cell(method="dense", impl="reference", mode="forward", dtype="fp32", device=device, seq_len=64)
        assert run_task(Task(kind="time", cell=cell, origin=ORIGIN)).status == "ok"
    assert seen == ["cuda:1"]


def test_torch_describes_itself():
    seen = run_task(Task(kind="environment")).environment
    assert seen["torch"] == torch.__version__
    assert seen["threads"] == torch.get_num_threads()


def test_a_counter_of_the_hardware_gives_joules_a_call(run, monkeypatch):
    class Counter:
        def joules(self, since: float | None = None) -> float:
            return 5.0

    monkeypatch.setattr(energy, "counter_for", lambda device: (Counter(), ""))
    monkeypatch.setattr(energy, "WINDOW_S", 0.0)
    assert run().samples.energy_j == 5.0


def test_what_the_samples_show_becomes_warnings(run, monkeypatch):
    shown = latency.Timing(samples=[1e-5] * 20 + [3e-5] * 20, cpu=[1e-5] * 40, warmup=[1e-5], stop="cap", steady=False)
    shown.throttled, shown.discarded = True, 3
    pairs = iter([drift.Pair(1.0, 1.0), drift.Pair(1.1, 0.9)])

    def measure(call: Any, protocol: Any, stopwatch: Any, consume: Any, slow: Any, reference: Any) -> latency.Timing:
        for _ in range(3):
            consume(call())
        return shown

    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(drift, "reference_pair", lambda device: next(pairs))
    samples = run().samples
    codes = {warning.partition(":")[0] for warning in samples.warnings}
    assert codes == {"unsteady", "few_samples", "short_calls", "bimodal", "throttled", "drift"}
    assert samples.sensors["discarded_samples"] == 3
    assert samples.sensors["reference_copy_s"] == [1.0, 0.9]
    assert "reference_beside_s" not in samples.sensors


def test_a_process_tells_how_fast_the_machine_was_beside_its_samples(run):
    samples = run().samples
    taken, seconds = zip(*samples.sensors["reference_beside_s"], strict=True)
    assert (taken[0], taken[-1]) == (0, len(samples.samples))
    assert list(taken) == sorted(set(taken))
    assert min(seconds) > 0


def test_a_sketch_that_declares_its_state_a_defect_may_drift():
    cell = Cell(
        method="memory_bank", impl="as_written", seq_len=320, d_model=32, num_heads=2, d_ff=64, memory=16,
        params={"num_slots": 16}, threads=1,
    )  # fmt: skip
    protocol = Protocol(sample_budget_s=0.02)
    task = Task(kind="time", cell=cell, origin="ctxbench.implementations.memory_bank", protocol=protocol, gate=True)
    outcome = run_task(task)
    assert outcome.status == "ok", outcome.reason
    assert outcome.gate.probes["state"] != "passed"
