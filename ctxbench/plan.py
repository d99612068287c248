"""From a configuration to cells: every combination yields exactly one planned cell, with a forecast or a reason."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from ctxbench import shard as shards
from ctxbench.cell import Cell
from ctxbench.config import AUTO, SUPPORTED, Config
from ctxbench.cost.figures import Evaluator, Figures
from ctxbench.cost.roofline import Ceilings, Point, forecast
from ctxbench.method import Impl, Method, Params
from ctxbench.registry import Registry
from ctxbench.rows import Forecast, Picked, Row, cell_of
from ctxbench.units import format_bytes, format_flops, format_seconds, format_tokens

RUNTIME_BYTES = 400 * 2**20  # an interpreter with torch loaded
INPUT_SETS = 3
ENDED_BADLY = ("oom", "timeout", "killed")  # at a length, and so expected at every larger one


@dataclass
class Planned:
    """One cell of a plan. ``status`` is planned, unsupported, skipped or error; ``reason`` is empty when planned.

    ``picked`` says why ``auto`` came to this cell's impl; None where ``auto`` was not asked or came to another.
    """

    cell: Cell
    origin: str
    method: Method
    status: str = "planned"
    reason: str = ""
    forecast: Forecast = field(default_factory=Forecast)
    figures: Figures | None = None
    formula_error: str = ""
    picked: Picked | None = None

    @cached_property
    def series(self) -> tuple[Any, ...]:
        """The cell's series; asked again and again while a run is forecast."""
        return self.cell.series


@dataclass
class Plan:
    """All cells of a configuration, in the order of its axes, or one part of them.

    ``whole`` counts the cells of all parts together, ``digest`` is their identity.
    """

    config: Config
    ceilings: Ceilings
    cells: list[Planned]
    whole: int = 0
    digest: str = ""

    def counts(self) -> dict[str, int]:
        """Number of cells by status."""
        return dict(Counter(planned.status for planned in self.cells))


def build(config: Config, registry: Registry, ceilings: dict[str, Ceilings], finished: Iterable[Row] = ()) -> Plan:
    """Plan a configuration; ``finished`` rows, of this run or an earlier one, sharpen the forecasts."""
    evaluator = Evaluator()
    cells: dict[str, Planned] = {}
    for name in config.methods:
        entry = registry.entries[name]
        for cell, picked in _cells(config, entry.method):
            if cell.key in cells:  # a method without a memory parameter has one cell for all memory sizes
                cells[cell.key].picked = cells[cell.key].picked or picked
                continue
            planned = _planned(cell, entry.method, entry.origin, evaluator)
            planned.picked = picked
            # `supported` asks for what runs here; every other choice gets a row that says why it does not.
            if planned.status != "unsupported" or SUPPORTED not in config.impls or picked or cell.impl in config.impls:
                cells[cell.key] = planned
    chosen = list(cells.values())
    if config.shard:
        chosen = shards.part(chosen, shards.parse(config.shard))
    plan = Plan(config, ceilings[config.device[0]], chosen, whole=len(cells), digest=shards.digest(cells))
    Forecaster(plan, ceilings, finished).refresh(plan.cells)
    return plan


class Forecaster:
    """Keeps what finished and judges what is left: forecasts, limits, and the backstop after a failure."""

    def __init__(self, plan: Plan, ceilings: dict[str, Ceilings], finished: Iterable[Row] = ()):
        self.config, self.ceilings = plan.config, ceilings
        self._figures = {planned.cell.key: planned.figures for planned in plan.cells}
        self._points: dict[Any, dict[int, Point]] = defaultdict(dict)
        self._failures: dict[Any, dict[int, str]] = defaultdict(dict)
        for row in finished:
            self.observe(row)

    def observe(self, row: Row) -> None:
        """Learn from a finished cell."""
        cell = cell_of(row)
        self._failures[cell.series].pop(cell.seq_len, None)
        if row.measured and row.latency_s is not None:
            peak = row.peak_bytes.allocated if row.peak_bytes else None
            self._points[cell.series][cell.seq_len] = Point(
                seq_len=cell.seq_len,
                latency_s=row.latency_s.median,
                peak_bytes=peak,
                figures=self._figures.get(cell.key),
            )
        elif row.status in ENDED_BADLY:
            self._failures[cell.series][cell.seq_len] = row.status

    def refresh(self, cells: Iterable[Planned]) -> None:
        """Forecast and judge again every cell that is planned or was skipped for a forecast."""
        for planned in cells:
            if planned.status not in ("planned", "skipped"):
                continue
            points = list(self._points[planned.cell.series].values())
            ceilings = self.ceilings[planned.cell.device]
            planned.forecast = forecast(planned.cell, planned.figures, ceilings, points)
            planned.reason = self._objection(planned)
            planned.status = "skipped" if planned.reason else "planned"

    def _objection(self, planned: Planned) -> str:
        """Why a cell should not run, empty when it may."""
        cell, expected, config = planned.cell, planned.forecast, self.config
        shorter = [length for length in self._failures[cell.series] if length < cell.seq_len]
        if shorter:
            length = max(shorter)
            return f"implied by {self._failures[cell.series][length]} at {format_tokens(length)} tokens"
        if config.max_flops is not None and planned.figures is not None and planned.figures.flops > config.max_flops:
            return f"{format_flops(planned.figures.flops)} a call, above --max-flops {format_flops(config.max_flops)}"
        limit = config.memory_limit.get(cell.device)
        if limit is not None and expected.peak_bytes is not None:
            needed = expected.peak_bytes + resident_bytes(planned)
            if needed > limit:
                return f"forecast of {format_bytes(needed)} is above the memory limit of {format_bytes(limit)}"
        # A roofline's middle may be far off, so only its bound can rule a cell out; scaled forecasts are trusted.
        trusted = expected.low if expected.basis.startswith("roofline") else expected.latency_s
        if trusted is not None and trusted > config.cell_timeout_s:
            return (
                f"forecast of {format_seconds(expected.latency_s)} a call is above what the cell timeout of "
                f"{format_seconds(config.cell_timeout_s)} allows ({expected.basis})"
            )
        return ""


def resident_bytes(planned: Planned) -> int:
    """Bytes a child needs beside the peak: runtime, parameters, inputs, incoming state."""
    cell = planned.cell
    tokens = cell.batch_size * (1 if cell.mode == "decode" else cell.seq_len)
    runtime = RUNTIME_BYTES if cell.device == "cpu" else 0
    elements = INPUT_SETS * tokens * cell.d_model + (planned.figures.num_parameters if planned.figures else 0)
    state = planned.figures.state_bytes if planned.figures and cell.mode == "decode" else 0
    return runtime + elements * cell.itemsize + state


def _cells(config: Config, method: Method) -> Iterator[tuple[Cell, Picked | None]]:
    """Every cell of a method, with the choice of ``auto`` where that was asked."""
    threads = config.protocol.threads
    for params, memory in _parameters(config, method):
        axes: Iterator[tuple[Any, ...]] = itertools.product(
            _impl_names(config.impls, method), config.mode, config.device, config.batch_size, config.d_model,
            config.num_heads, config.num_layers, config.d_ff, config.causal, config.position, config.seq_len,
        )  # fmt: skip
        for impl, mode, device, batch, width, heads, layers, ffn, causal, position, seq_len in axes:
            for dtype in config.dtype:
                cell = Cell(
                    method=method.name,
                    impl=impl,
                    mode=mode,
                    device=device,
                    dtype=dtype or ("fp32" if device == "cpu" else "bf16"),
                    batch_size=batch,
                    seq_len=seq_len,
                    d_model=width,
                    num_heads=heads,
                    num_layers=_fewest_layers(method, params) if layers is None else layers,
                    d_ff=4 * width if ffn is None else ffn,
                    causal=_preferred(method.causal, False) if causal is None else causal,
                    position=_preferred(method.positions, "none") if position is None else position,
                    memory=memory,
                    params=params,
                    threads=threads,
                )
                if impl != AUTO:
                    yield cell, None
                    continue
                cell, picked = _pick(cell, method, config)
                if f"-{cell.impl}" not in config.impls:
                    yield cell, picked


def _pick(cell: Cell, method: Method, config: Config) -> tuple[Cell, Picked]:
    """The cell with the impl that ``auto`` means for its device, dtype, mode and shape, and why that one."""
    without = [name[1:] for name in config.impls if name.startswith("-")]
    try:
        choice = method.pick(
            cell.mode, cell.dims, cell.params_for(method), cell.device, cell.dtype, config.capability.get(cell.device),
            without,
        )  # fmt: skip
    except Exception as error:  # values out of range, or what a plug-in raises; the support check of the cell says so
        why = f"the table could not be asked: {type(error).__name__}: {error}"
        return msgspec.structs.replace(cell, impl=method.portable), Picked(why=why)
    picked = Picked(why=choice.why, measured=choice.measured, passed=list(choice.passed))
    return msgspec.structs.replace(cell, impl=choice.impl), picked


def _parameters(config: Config, method: Method) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Every setting of the method's parameters as plain values, with the value of its memory parameter."""
    chosen = dict(config.params.get(method.name, {}))
    name = method.memory_parameter
    if name is not None and name not in chosen and config.memory != [None]:
        chosen[name] = config.memory
    plain = method.params().as_dict()
    for values in itertools.product(*chosen.values()):
        params = {**plain, **dict(zip(chosen, values, strict=True))}
        yield params, None if name is None else params[name]


def _impl_names(chosen: list[str], method: Method) -> list[str]:
    own = [impl.name for impl in method.impls]
    wanted: list[str] = []
    for name in chosen if not chosen[0].startswith("-") else ["all", *chosen]:
        if name in ("all", SUPPORTED):
            wanted += own
        elif name.startswith("-"):
            wanted = [other for other in wanted if other != name[1:]]
        else:
            wanted.append(name)
    return list(dict.fromkeys(wanted))


def _preferred(accepted: tuple[Any, ...], otherwise: Any) -> Any:
    return accepted[0] if accepted else otherwise


def _fewest_layers(method: Method, params: dict[str, Any]) -> int:
    try:
        return method.fewest_layers(method.params().replace(**params))
    except Exception:  # values out of range; the support check of the cell says so
        return 1


def _planned(cell: Cell, method: Method, origin: str, evaluator: Evaluator) -> Planned:
    planned = Planned(cell, origin, method)
    try:
        params = cell.params_for(method)
        dims = cell.dims
    except ValueError as error:
        planned.status, planned.reason = "unsupported", str(error)
        return planned
    try:
        reason = _refusal(cell, method, params, dims)
    except Exception as error:  # a plug-in's support function may raise anything
        planned.status, planned.reason = "error", f"support of {method.name} raised {type(error).__name__}: {error}"
        return planned
    if reason:
        planned.status, planned.reason = "unsupported", reason
        return planned
    try:
        planned.figures = evaluator.figures(method, cell)
    except Exception as error:  # and so may its formulas
        planned.formula_error = f"{type(error).__name__}: {error}"
    return planned


def _refusal(cell: Cell, method: Method, params: Params, dims: Any) -> str:
    impl: Impl | None = next((impl for impl in method.impls if impl.name == cell.impl), None)
    if impl is None:
        return f"{method.name} has no impl {cell.impl} (it has {', '.join(impl.name for impl in method.impls)})"
    if cell.dtype == "fp16" and cell.device == "cpu":
        return "fp16 is emulated on CPU, so its time says nothing about the method; use fp32 or bf16"
    answer = method.mode_support(cell.mode, dims, params)
    if answer:
        answer = method.impl_support(impl, cell.mode, dims, params, cell.device, cell.dtype)
    return "" if answer else answer.reason or "not supported"


def as_row_fields(planned: Planned) -> dict[str, Any]:
    """What ``plan --json`` prints of a cell."""
    return {
        **msgspec.to_builtins(planned.cell),
        "cell": planned.cell.key,
        "status": planned.status,
        "reason": planned.reason,
        "picked": None if planned.picked is None else msgspec.to_builtins(planned.picked),
        "forecast": msgspec.to_builtins(planned.forecast),
        "formula": None if planned.figures is None else msgspec.to_builtins(planned.figures),
    }
