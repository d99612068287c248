"""What the supervisor asks of a child process, and what comes back. Imports no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from ctxbench.cell import Cell
from ctxbench.rows import Gate


class Protocol(msgspec.Struct, frozen=True, kw_only=True):
    """How a cell is measured. ``processes`` are the replicates: children, not iterations."""

    processes: int = 3
    precision: float = 0.02
    min_samples: int = 10
    sample_budget_s: float = 0.5
    sample_cap_s: float = 15.0
    gate: bool = True
    seed: int = 0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One child process' work on one cell. ``origin`` reloads the method (see registry.Entry.origin).

    kind: ``time`` (gate when asked, warm-up, samples), ``memory`` (peaks, state, counters, FLOPs),
    ``trace`` (fake tensors only), ``calibrate`` (ceilings of this machine), ``environment`` (torch's view of it).
    """

    kind: str
    cell: Cell | None = None
    origin: str = ""
    protocol: Protocol = Protocol()
    gate: bool = False
    passed: list[Gate] = []  # gates that passed in this run, of cells that differ from this one in their length alone
    engine: str = ""  # the tracer's, where a memory process of this run has compared both for the same series
    process: int = 0  # index of the replicate; varies the inputs' seed
    expected_s: float | None = None  # forecast of one call


class Samples(msgspec.Struct, kw_only=True):
    """What a ``time`` child returns; all durations in seconds."""

    samples: list[float]
    cpu: list[float]
    warmup: list[float] = []
    stop: str = ""
    steady: bool = True
    set_up_s: float = 0.0
    faults_per_call: float = 0.0
    contended: bool = False
    sensors: dict[str, Any] = {}
    energy_j: float | None = None
    energy_reason: str = ""
    checksum: float | None = None
    warnings: list[str] = []


class Memory(msgspec.Struct, kw_only=True):
    """What a ``memory`` child returns; bytes above what was live before the call.

    ``engine`` is the tracer's for all lengths of the cell's series; empty where both were not compared.
    """

    allocated: int | None = None
    resident: int | None = None
    traced: int | None = None
    meter: str = ""
    state: int | None = None
    parameters: int | None = None
    counted_flops: int | None = None
    coverage: float | None = None
    uncounted: dict[str, int] = {}
    bytes_moved: int | None = None
    engine: str = ""
    warnings: list[str] = []


class Calibration(msgspec.Struct, kw_only=True):
    """Ceilings measured on this machine with the run's thread count."""

    matmul_flops_per_s: dict[str, float]  # by dtype
    copy_bytes_per_s: float
    threads: int
    device: str = "cpu"
    measured_at: str = ""


class Outcome(msgspec.Struct, kw_only=True):
    """How a child ended. ``status`` is a row status; ``detail`` is the truncated traceback or log."""

    status: str
    reason: str = ""
    detail: str = ""
    elapsed_s: float = 0.0
    gate: Gate | None = None
    samples: Samples | None = None
    memory: Memory | None = None
    calibration: Calibration | None = None
    environment: dict[str, Any] | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One line from the client to its server: run this in a child of its own, within these limits."""

    task: Task
    timeout_s: float
    memory_limit: int | None = None  # bytes the child may take beyond what it starts with


class Report(msgspec.Struct, kw_only=True):
    """One line from a server to its client; without ``ended`` it only says which process has begun.

    ``exit_code`` is negative for the signal that ended the child. ``oom_kills`` counts processes that the kernel killed
    for want of memory meanwhile.
    """

    pid: int
    ended: bool = False
    exit_code: int = 0
    timed_out: bool = False
    outcome: Outcome | None = None
    log: str = ""
    elapsed_s: float = 0.0
    oom_kills: int = 0
