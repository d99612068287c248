"""What a question is about: which cells, on which machine, with which rows as evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ctxbench import suite as suites
from ctxbench.analysis.devices import DEVICES, Device
from ctxbench.cli.common import Common
from ctxbench.config import Config, memory_available, resolve
from ctxbench.cost.roofline import Ceilings
from ctxbench.devices import cuda_present
from ctxbench.errors import UserError, unknown
from ctxbench.plan import Planned, build
from ctxbench.registry import Registry
from ctxbench.rows import Row
from ctxbench.run.session import load_ceilings
from ctxbench.run.store import RUN
from ctxbench.suite import Layer, Suite
from ctxbench.units import format_bytes, format_flops, parse_bytes

if TYPE_CHECKING:
    from ctxbench.analysis.forecast import Forecaster
    from ctxbench.analysis.runs import Run


@dataclass(frozen=True)
class Target:
    """Cells of a selection on one machine. ``title`` names the machine and where its ceilings come from."""

    config: Config
    cells: list[Planned]
    forecaster: Forecaster
    rows: tuple[Row, ...]
    ceilings: Ceilings
    title: str
    limit: int | None


def target(suite: str | None, flags: Suite, folder: Path | None, registry: Registry, ctx: Common) -> Target:
    """Resolve a selection on a device, with or without a run; a sketch with defects must be named to be asked about.

    Raises:
        UserError: for an unknown device, several devices, or a run that does not say how it was configured.
    """
    from ctxbench.analysis.forecast import Forecaster
    from ctxbench.analysis.runs import read_run

    device, flags = _device(flags)
    run = read_run(folder) if folder is not None else None
    for warning in run.warnings if run else ():
        ctx.note(warning)
    name, stack = suites.layers(suite, flags, Path.cwd())
    if run is not None:
        stack = [*stack[:-1], Layer(f"run {run.name}", _configured(run, registry, ctx)), stack[-1]]
    config = resolve(name, stack, registry)
    if len(config.device) > 1:
        raise UserError(f"one device at a time, received {', '.join(config.device)}")
    if device:
        config = msgspec.structs.replace(config, capability={"cuda": device.capability})
    ceilings = device.ceilings if device else _ceilings(config, run)
    rows = run.rows if run and not device else ()
    if run and device:
        ctx.note(f"the rows of {run.name} were not measured on {device.title}: its answers rest on the roofline alone")
    kind = f"datasheet peaks of {device.title}" if device else "" if ceilings.calibrated else "built-in ceilings"
    plan = build(config, registry, {config.device[0]: ceilings})
    named = flags.axes.impls is not None
    cells = [planned for planned in plan.cells if named or not _is_sketch(planned)]
    return Target(
        config=config,
        cells=cells,
        forecaster=Forecaster(registry, ceilings, rows, kind),
        rows=rows,
        ceilings=ceilings,
        title=f"{device.title}, datasheet peaks" if device else f"{config.device[0]}, {_origin(ceilings, config)}",
        limit=_limit(config, device),
    )


def refuse_run(suite: str | None) -> None:
    """Tell where a run goes that was given in the place of a suite.

    Raises:
        UserError: it is the folder of a run.
    """
    if suite is not None and (Path(suite) / RUN).is_file():
        raise UserError(f"{suite!r} is the folder of a run, not a suite\n  accepted: --run {suite}")


def _device(flags: Suite) -> tuple[Device | None, Suite]:
    """A device of the table becomes ``cuda`` with the peaks of its datasheet."""
    asked = flags.axes.device
    if not isinstance(asked, str) or asked.partition(":")[0] in ("cpu", "cuda", "auto"):
        return None, flags
    if asked.lower() not in DEVICES:
        raise unknown("device", asked, ["auto", "cpu", "cuda", *DEVICES])
    axes = msgspec.structs.replace(flags.axes, device="cuda")
    return DEVICES[asked.lower()], msgspec.structs.replace(flags, axes=axes)


def _configured(run: Run, registry: Registry, ctx: Common) -> Suite:
    """The configuration a run was made with, as a layer; its methods by name."""
    config: Any = run.info.get("config") or {}
    merged: Any = config.get("merged") if isinstance(config, dict) else None
    if not isinstance(merged, dict):
        methods = sorted({row.method for row in run.rows})
        sections: dict[str, dict[str, Any]] = {"axes": {"seq_len": sorted({row.seq_len for row in run.rows})}}
    else:
        methods = list(config.get("methods") or [])
        sections = {}
        for key, value in merged.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
    sections.pop("limits", None)
    known = [name for name in methods if name in registry.entries]
    if len(known) < len(methods):
        missing = ", ".join(name for name in methods if name not in known)
        ctx.note(f"methods of {run.name} that are not loaded here and are left out: {missing}; --plugin loads them")
    sections.setdefault("axes", {})["methods"] = known
    try:
        return msgspec.convert(sections, Suite)
    except msgspec.ValidationError as error:
        raise UserError(
            f"the configuration in run.json of {run.name} cannot be read: {error}\n"
            "  accepted: a folder that this version of `ctxbench run` wrote"
        ) from None


def _ceilings(config: Config, run: Run | None) -> Ceilings:
    """Those of the run, else those this machine's first run measured, else the built-in ones."""
    device = config.device[0]
    stored: Any = (run.info.get("calibration") or {}).get(device) if run else None
    if stored:
        try:
            return msgspec.convert(stored, Ceilings)
        except msgspec.ValidationError:  # written by a version that kept other fields
            pass
    return load_ceilings(config)[device]


def _origin(ceilings: Ceilings, config: Config) -> str:
    """Where the ceilings of a device outside the table come from; those of an absent one are an assumption."""
    if ceilings.calibrated:
        return "measured ceilings"
    if config.device[0].startswith("cuda") and not cuda_present():
        rate, copied = format_flops(ceilings.matmul("bf16")), format_bytes(int(ceilings.bytes_per_s))
        known = "|".join(DEVICES)
        return f"which is not here: {rate}/s in bf16 and {copied}/s are assumed; --device {known} asks a datasheet"
    return "built-in ceilings; a first `ctxbench run` measures them"


def _limit(config: Config, device: Device | None) -> int | None:
    text = str(config.merged["limits.memory_limit"])
    return parse_bytes(text, device.memory_bytes if device else memory_available(config.device[0])) if (
        device or config.device[0] in config.memory_limit
    ) else None  # fmt: skip


def _is_sketch(planned: Planned) -> bool:
    return any(impl.name == planned.cell.impl and impl.defects for impl in planned.method.impls)
