"""The outcome of one cell: one JSON object a line. Units are in the names; text is formatted only at the edge."""

from __future__ import annotations

from typing import Any

import msgspec

from ctxbench.cell import Cell

SCHEMA = "ctxbench.row/1"
STATUSES = ("ok", "unstable", "unsupported", "skipped", "oom", "timeout", "killed", "gate_failed", "error")
FAILURES = ("oom", "timeout", "killed", "gate_failed", "error")  # exit code 1; a skip by forecast is not a failure


class Latency(msgspec.Struct, kw_only=True):
    """Seconds a call. ``median`` is the median of process medians; ``samples`` holds every sample of every process.

    ``low`` and ``high`` bound it: a 95 % bootstrap interval over processes, or the range where there are fewer than
    five. ``stop`` says, a process, which rule ended sampling. ``cpu_median`` is process CPU time.
    """

    median: float
    low: float
    high: float
    samples: list[list[float]]
    cpu_median: float | None = None
    n_processes: int
    stop: list[str] = []
    outliers: int = 0
    faults_per_call: float | None = None
    contended: list[bool] = []
    warmup: list[list[float]] = []
    set_up: float | None = None


class PeakBytes(msgspec.Struct, kw_only=True):
    """Bytes above what was live before the call (parameters, inputs, incoming state).

    allocated: the allocator's own events, byte-exact. resident: growth of the resident high-water mark. traced: the
    fake-tensor tracer. formula: the closed form. agree: the two meters within max(2 MiB, 3 %).
    """

    allocated: int | None = None
    resident: int | None = None
    traced: int | None = None
    formula: int | None = None
    agree: bool | None = None
    meter: str = ""


class StateBytes(msgspec.Struct, kw_only=True):
    """Bytes that must survive after ``seq_len`` tokens."""

    measured: int | None = None
    formula: int | None = None


class Counted(msgspec.Struct, kw_only=True):
    """A quantity by measurement and by formula."""

    measured: int | None = None
    formula: int | None = None


class Flops(msgspec.Struct, kw_only=True):
    """Algorithmic: what the mathematics needs. formula: what this impl executes. counted: what the dispatcher saw.

    ``coverage`` is the share of operator traffic whose operator has a formula or is known to multiply no matrices.
    """

    algorithmic: int | None = None
    formula: int | None = None
    counted: int | None = None
    coverage: float | None = None
    uncounted: dict[str, int] = {}
    convention: str = "1 multiply-add = 2; matmul-like work only"


class Gate(msgspec.Struct, kw_only=True):
    """The correctness check that precedes every timing; ``probes`` maps each probe to passed, failed or not claimed.

    ``specimen`` names what was computed. ``stands_for`` is true where a shorter cell of the run has computed the same.
    """

    ok: bool
    error: float | None = None
    tolerance: float | None = None
    length: int | None = None
    probes: dict[str, str] = {}
    message: str = ""
    specimen: str = ""
    stands_for: bool = False


class Forecast(msgspec.Struct, kw_only=True):
    """What the plan expected before the cell ran; None where nothing is known."""

    latency_s: float | None = None
    low: float | None = None
    high: float | None = None
    peak_bytes: int | None = None
    basis: str = ""


class Picked(msgspec.Struct, kw_only=True):
    """How ``--impls auto`` came to the row's impl: why, whether that was ever measured, which lines it passed over."""

    asked: str = "auto"
    why: str
    measured: bool = False
    passed: list[str] = []

    def __str__(self) -> str:
        seen = "" if self.measured else " (expected, not measured)"
        over = f"; passed over {'; '.join(self.passed)}" if self.passed else ""
        return f"{self.why}{seen}{over}"


class Row(msgspec.Struct, kw_only=True):
    """One planned cell's outcome. Every planned cell yields exactly one row, whatever happened."""

    schema: str = SCHEMA
    cell: str
    status: str
    reason: str = ""
    method: str
    impl: str
    mode: str
    device: str
    dtype: str
    batch_size: int
    seq_len: int
    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    causal: bool
    position: str
    memory: int | None = None
    params: dict[str, Any] = {}
    threads: int = 0
    latency_s: Latency | None = None
    tokens_per_s: float | None = None
    peak_bytes: PeakBytes | None = None
    state_bytes: StateBytes | None = None
    num_parameters: Counted | None = None
    flops: Flops | None = None
    bytes_moved: int | None = None
    energy_j: float | None = None
    energy_reason: str = ""
    gate: Gate | None = None
    forecast: Forecast | None = None
    picked: Picked | None = None
    warnings: list[str] = []
    env_delta: dict[str, Any] = {}
    detail: str = ""
    started_at: str = ""
    elapsed_s: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether the row carries a latency that passed its gate."""
        return self.status in ("ok", "unstable") and self.latency_s is not None


def row_for(cell: Cell, status: str, reason: str = "", **fields: Any) -> Row:
    """Start the row of a cell."""
    return Row(cell=cell.key, status=status, reason=reason, **{**msgspec.to_builtins(cell), **fields})


def cell_of(row: Row) -> Cell:
    """The cell a row answers."""
    return Cell(**{name: getattr(row, name) for name in Cell.__struct_fields__})


def encode(row: Row) -> bytes:
    """One line of ``rows.jsonl``, with its newline."""
    return msgspec.json.encode(row) + b"\n"


def decode(line: bytes) -> Row:
    """Read one line back; raises msgspec.ValidationError with the path of what is wrong."""
    return msgspec.json.decode(line, type=Row)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a row."""
    return msgspec.json.schema(Row)
