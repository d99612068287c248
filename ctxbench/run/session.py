"""One session of ``ctxbench run``: folder, fork servers, calibration, ``run.json``, supervisor."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from ctxbench import __version__
from ctxbench.cell import PROTOCOL, Cell
from ctxbench.config import Config
from ctxbench.cost import machine
from ctxbench.cost.roofline import Ceilings
from ctxbench.devices import torch_version
from ctxbench.errors import RunFolderError
from ctxbench.plan import Plan, build
from ctxbench.registry import Registry
from ctxbench.run.progress import Progress
from ctxbench.run.store import Store, now, read_run
from ctxbench.run.supervisor import SET_UP_S, Executor, MakeExecutor, Summary, Supervisor, ceilings_of
from ctxbench.run.tasks import Task


def load_ceilings(config: Config) -> dict[str, Ceilings]:
    """Ceilings of every device of the configuration, calibrated where an earlier run has done so."""
    return {device: machine.load(device, config.protocol.threads, torch_version()) for device in config.device}


def servers(threads: int) -> MakeExecutor:
    """The real executors: a fork server a heap and a device."""

    def make(heap: str, device: str) -> Executor:
        from ctxbench.run.client import Server

        return Server(heap, threads=threads, device=device)

    return make


def check_continues(folder: Path, config: Config) -> None:
    """Refuse to mix two configurations in one folder; limits may differ between sessions.

    Raises:
        RunFolderError: names the values that differ.
    """
    header = read_run(folder)
    earlier = header.get("comparable")
    if earlier is None and header.get("merged_from"):
        raise RunFolderError(
            f"{folder} holds merged runs of different plans: it can be read, not continued\n"
            "  continue the runs it was merged from, then `ctxbench merge` them again"
        )
    if earlier is None:
        return
    present = msgspec.json.decode(msgspec.json.encode(config.comparable))
    differing = sorted(key for key in {*earlier, *present} if earlier.get(key) != present.get(key))
    if differing:
        shown = "; ".join(f"{key} was {earlier.get(key)}, now {present.get(key)}" for key in differing[:3])
        raise RunFolderError(
            f"{folder} holds a run of another configuration: {shown}\n  continue it with `ctxbench run --out {folder}`"
            ", choose another folder with --out, or start over with --fresh"
        )


def execute(
    config: Config, registry: Registry, folder: Path, command: str, fresh: bool = False, rerun: str = "",
    progress: Progress | None = None, make_executor: MakeExecutor | None = None, only: Collection[str] | None = None,
) -> tuple[Summary, Plan]:  # fmt: skip
    """Run a configuration in a folder, or what is left of it there.

    ``only`` takes the cells with these keys from the plan; a folder keeps rows of planned cells alone, so such a
    session belongs in a folder of its own.

    Raises:
        RunFolderError: the folder is locked, damaged, of another schema or of another configuration.
        EnvironmentUnusable: the folder cannot be written, or no measuring process can be started.
    """
    with Store.open(folder, fresh) as store:
        check_continues(folder, config)
        ceilings = load_ceilings(config)
        plan = build(config, registry, ceilings, store.rows.values())
        if only is not None:
            plan.cells = [planned for planned in plan.cells if planned.cell.key in only]
        make = make_executor or servers(config.protocol.threads)
        supervisor = Supervisor(plan, store, ceilings, make, progress)
        session = {"started_at": now(), "command": command, "budget_s": config.budget_s, "rerun": rerun}
        header = _header(store, plan, registry, command)
        sessions = [*header["sessions"], session]
        store.write_header({**header, "status": "running", "sessions": sessions})

        def set_up(supervisor: Supervisor) -> None:
            for device in config.device:  # both import torch at the same time
                for heap in ("timing", "memory"):
                    supervisor.executor(heap, device)
            header["environment"] = {**fingerprint(), **_torch_view(supervisor)}
            _calibrate(supervisor)
            header["calibration"] = msgspec.to_builtins(supervisor.ceilings)
            store.write_header({**header, "status": "running", "sessions": sessions})

        summary = supervisor.run(rerun, set_up)
        session |= {"ended_at": now(), "elapsed_s": summary.elapsed_s, "interrupted": summary.interrupted}
        header |= {
            "status": "interrupted" if summary.interrupted else "finished",
            "ended_at": now(),
            "sessions": sessions,
            "counts": summary.counts(),
            "warnings": summary.warnings(),
            "notes": summary.notes,
        }
        store.write_header(header)
    return summary, plan


def fingerprint() -> dict[str, Any]:
    """What this machine is; without the meter's module, the little the standard library knows."""
    if importlib.util.find_spec("ctxbench.env") is None:
        return {"platform": platform.platform(), "python": platform.python_version()}
    from ctxbench import env

    found: dict[str, Any] = env.fingerprint()
    return found


def _header(store: Store, plan: Plan, registry: Registry, command: str) -> dict[str, Any]:
    """``run.json`` at the start of a session; what earlier sessions wrote about themselves stays."""
    config, earlier = plan.config, store.header
    return {
        "id": store.folder.name,
        "suite": config.suite,
        "created_at": earlier.get("created_at", now()),
        "command": earlier.get("command", command),
        "versions": versions(registry),
        "config": msgspec.to_builtins(config),
        "comparable": config.comparable,
        "plan": {"cells": len(plan.cells), "counts": plan.counts(), "whole": plan.whole, "digest": plan.digest},
        "plugins": [{"name": broken.name, "error": broken.error} for broken in registry.broken],
        "environment": earlier.get("environment", {}),
        "calibration": earlier.get("calibration", {}),
        "sessions": earlier.get("sessions", []),
    }


def versions(registry: Registry) -> dict[str, Any]:
    """The software that is here now, as ``run.json`` writes it."""
    return {
        "ctxbench": __version__,
        "protocol": PROTOCOL,
        "python": platform.python_version(),
        "torch": torch_version(),
        "packages": _packages(registry),
    }


def _packages(registry: Registry) -> dict[str, str]:
    """Distributions that the methods come from, with their versions."""
    found = {}
    for package in sorted({entry.package for entry in registry.entries.values()}):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a --plugin path
            found[package] = ""
    return found


def _torch_view(supervisor: Supervisor) -> dict[str, Any]:
    """Torch's own description of the first device, from a child: this process imports no torch."""
    device = supervisor.config.device[0]
    task = Task(kind="environment", cell=_no_cell(supervisor, device))
    outcome = supervisor.executor("timing", device).submit(task, SET_UP_S, None)
    return {"torch_view": outcome.environment} if outcome.environment else {}


def _calibrate(supervisor: Supervisor) -> None:
    """Measure the ceilings of every device; without them, forecasts stay cautious."""
    threads = machine.usable_threads(supervisor.config.protocol.threads)
    for device, known in list(supervisor.ceilings.items()):
        task = Task(kind="calibrate", cell=_no_cell(supervisor, device))
        outcome = supervisor.executor("timing", device).submit(task, SET_UP_S, None)
        if outcome.calibration is not None:
            ceilings = known.raised_by(ceilings_of(outcome.calibration, threads))
            supervisor.use_ceilings(ceilings)
            machine.save(ceilings, torch_version())
        elif not known.calibrated:
            supervisor.store.notes.append(f"{device} could not be calibrated ({outcome.reason}); forecasts are rough")


def _no_cell(supervisor: Supervisor, device: str) -> Cell:
    """Device and threads of a task that concerns no cell."""
    return Cell(method="none", impl="none", seq_len=1, device=device, threads=supervisor.config.protocol.threads)
