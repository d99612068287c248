"""``ctxbench doctor``: is this machine fit to measure on, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import re
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import click

from ctxbench.cli.common import Common, common_options, table
from ctxbench.cli.listing import devices
from ctxbench.compiler import looked_for
from ctxbench.devices import parse_devices
from ctxbench.errors import CtxbenchError, Exit

CALIBRATIONS = 3
QUIET_SPREAD = 0.05


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis: ``ok``, ``note``, ``warning`` or ``problem``; ``advice`` says what to do next."""

    topic: str
    level: str
    found: str
    advice: str = ""


@click.command()
@click.option("--device", default="cpu", help="Device to examine.")
@click.option("--quick", is_flag=True, help="Leave out the noise test, which takes a few seconds.")
@common_options
def command(device: str, quick: bool, ctx: Common) -> None:
    """Devices, versions, noise, meters and missing extras; exit code 5 where nothing could be measured."""
    from ctxbench import env

    (device,) = parse_devices([device])
    fingerprint = env.fingerprint()
    findings = [*_machine(fingerprint), *_packages(), *_plugins(ctx)]
    findings += _measuring(device, quick)
    if ctx.json:
        ctx.emit({"findings": [asdict(finding) for finding in findings], "environment": fingerprint})
    else:
        marks = {"ok": "ok", "note": "-", "warning": "!", "problem": "X"}
        click.echo(table(["", "TOPIC", "FOUND"], [[marks[f.level], f.topic, f.found] for f in findings]))
        for finding in findings:
            if finding.advice:
                click.echo(f"\n{finding.topic}: {finding.advice}")
    if any(finding.level == "problem" for finding in findings):
        raise click.exceptions.Exit(Exit.ENVIRONMENT)


def _machine(fingerprint: dict[str, Any]) -> list[Finding]:
    cpu, memory, load = fingerprint["cpu"], fingerprint["memory"], fingerprint["load"]
    gib = memory.get("available_bytes", 0) / 2**30
    found = [
        Finding("processor", "ok", f"{cpu.get('model', 'unknown')}, {cpu.get('cores_usable')} usable cores"),
        Finding("memory", "ok", f"{gib:.1f} GiB available"),
        _compiler(fingerprint.get("compiler")),
        *(Finding("device", "ok", f"{device['name']}: {device['title']}") for device in devices()),
    ]
    if cpu.get("hypervisor"):
        found.append(
            Finding(
                "virtual machine", "note", "yes", "neighbours on the host can disturb timings without being seen here"
            )
        )
    governor = cpu.get("governor")
    if governor and governor != "performance":
        found.append(
            Finding(
                "governor", "warning", governor, "set the performance governor: cpupower frequency-set -g performance"
            )
        )
    pressure = re.search(r"avg10=([0-9.]+)", str(load.get("pressure_cpu", "")))
    if pressure is None:
        found.append(Finding("pressure sensor", "note", "absent", "contention is judged by run-queue delay alone"))
    else:
        share = float(pressure[1])
        advice = (
            "other work waits for the processor; close it, or timings will be marked contended" if share > 20 else ""
        )
        found.append(Finding("cpu pressure", "warning" if share > 20 else "ok", f"{share:.0f} % (10 s)", advice))
    return found


def _compiler(found: dict[str, str] | None) -> Finding:
    if found is None:
        advice = f"impls native need one: install g++ or let CXX name one; looked for {looked_for()}"
        return Finding("c++ compiler", "note", "none", advice)
    return Finding("c++ compiler", "ok", f"{found['command']}: {found['version'] or 'says no version'}")


def _packages() -> list[Finding]:
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions() if dist.metadata["Name"]}
    found = [Finding("torch", "ok", importlib.metadata.version("torch"))] if "torch" in installed else []
    if not found:
        found.append(Finding("torch", "problem", "not installed", "pip install torch"))
    if "pynvml" in installed:
        advice = "the distribution pynvml is deprecated: pip uninstall pynvml && pip install nvidia-ml-py"
        found.append(Finding("pynvml", "warning", "installed", advice))
    for extra, packages in _extras().items():
        missing = [package for package in packages if package not in installed]
        if extra in ("test", "dev"):
            continue
        state = f"missing {', '.join(missing)}" if missing else "installed"
        advice = f"pip install 'ctxbench[{extra}]'" if missing else ""
        found.append(Finding(f"extra {extra}", "note" if missing else "ok", state, advice))
    return found


def _extras() -> dict[str, list[str]]:
    """Packages of each extra, as the installed distribution declares them."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("ctxbench") or []:
        match = re.match(r"([A-Za-z0-9._-]+).*extra == [\"']([a-z0-9]+)[\"']", requirement)
        if match:
            extras.setdefault(match[2], []).append(match[1].lower())
    return extras


def _plugins(ctx: Common) -> list[Finding]:
    from ctxbench.registry import discover

    registry = discover(ctx.plugins)
    found = [Finding("methods", "ok", ", ".join(registry.names()))]
    found += [Finding(f"plug-in {b.name}", "warning", "could not be loaded", b.error) for b in registry.broken]
    return found


def _measuring(device: str, quick: bool) -> list[Finding]:
    """Start the real measuring process: what torch sees, which meters work, how much repeated work varies."""
    from ctxbench.cell import Cell
    from ctxbench.run.client import Server
    from ctxbench.run.tasks import Task

    cell = Cell(method="none", impl="none", seq_len=1, device=device)
    found = []
    try:
        with Server("timing", device=device) as server:
            view = server.submit(Task(kind="environment", cell=cell), timeout_s=120)
            if view.environment is None:
                return [Finding("measuring", "problem", view.status, f"{view.reason}\n{view.detail}".strip())]
            found.append(Finding("threads", "ok", str(view.environment.get("threads"))))
            if device.startswith("cuda") and not view.environment.get("cuda_available"):
                return [
                    *found,
                    Finding("cuda", "problem", "torch sees no CUDA device", "install a CUDA build of torch"),
                ]
            if not quick:
                tasks = [server.submit(Task(kind="calibrate", cell=cell), timeout_s=120) for _ in range(CALIBRATIONS)]
                found.append(_noise([task.calibration.matmul_flops_per_s for task in tasks if task.calibration]))
    except CtxbenchError as error:
        return [*found, Finding("measuring", "problem", "no measuring process could be started", str(error))]
    return [*found, _energy(device)]


def _noise(calibrations: list[dict[str, float]]) -> Finding:
    """Spread of the same matrix product over fresh processes."""
    rates = [max(rates.values()) for rates in calibrations if rates]
    if len(rates) < 2:
        return Finding("noise test", "warning", "no calibration succeeded", "see `ctxbench run -v`")
    spread = (max(rates) - min(rates)) / statistics.median(rates)
    typical = f"{statistics.median(rates) / 1e9:.0f} GFLOP/s"
    shown = f"matrix product {typical}, spread {100 * spread:.0f} % over {len(rates)} processes"
    if spread <= QUIET_SPREAD:
        return Finding("noise test", "ok", shown)
    return Finding("noise test", "warning", shown, "close other programs, or raise --processes")


def _energy(device: str) -> Finding:
    from ctxbench.measure import energy

    counter, reason = energy.counter_for(device)
    return Finding(
        "energy", "ok" if counter else "note", type(counter).__name__ if counter else f"not measured: {reason}"
    )
