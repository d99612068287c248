"""``ctxbench list``: what is there. Never imports torch, and no table library, so that it answers at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ctxbench.cli.common import Common, common_options, table
from ctxbench.devices import parse_devices
from ctxbench.errors import unknown
from ctxbench.method import Dims, Method
from ctxbench.registry import Registry, discover

WHAT = ("methods", "impls", "suites", "metrics", "devices")
METRICS = {
    "latency_s": "seconds a call: median of process medians with its interval",
    "tokens_per_s": "tokens a second, batch included",
    "peak_bytes": "most bytes alive above parameters and inputs: allocator events, resident growth, tracer, formula",
    "state_bytes": "bytes that must survive between calls",
    "num_parameters": "trainable elements",
    "flops": "algorithmic, by formula, counted by the dispatcher",
    "bytes_moved": "operands and results of every operator, each once; a fused kernel is one operator",
    "energy_j": "joules a call, only where a counter exists",
}


@click.command()
@click.argument("what", default="methods", metavar="[methods|impls|suites|metrics|devices]")
@click.option("--device", default="cpu", help="Device that support is asked for.")
@common_options
def command(what: str, device: str, ctx: Common) -> None:
    """List methods (default), impls, suites, metrics or devices."""
    if what not in WHAT:
        raise unknown("listing", what, WHAT)
    (device,) = parse_devices([device])
    rows: list[dict[str, Any]]
    if what in ("methods", "impls"):
        registry = ctx.registry() if ctx.json else discover(ctx.plugins)  # a table says itself what is broken
        methods = [method_entry(method, device) for method in registry]
        if what == "methods":
            rows = methods
            shown = [
                [m["name"], m["family"], _text(m["memory_parameter"]), ",".join(m["modes"]), _impls(m)] for m in rows
            ]
            headers = ["NAME", "FAMILY", "MEMORY", "MODES", "IMPLS"]
        else:
            rows = [{"method": m["name"], **impl} for m in methods for impl in m["impls"]]
            shown = [
                [r["method"], r["name"], "yes" if r["supported"] else "no", r["reason"] or r["note"]] for r in rows
            ]
            headers = ["METHOD", "IMPL", "SUPPORTED", "NOTE"]
        if not ctx.json:
            _print_broken(registry)
    elif what == "suites":
        from ctxbench.suite import load_suite, names

        rows = [{"name": name, "title": load_suite(name).title} for name in names()]
        shown, headers = [[r["name"], r["title"]] for r in rows], ["NAME", "TITLE"]
    elif what == "metrics":
        rows = [{"name": name, "meaning": meaning} for name, meaning in METRICS.items()]
        shown, headers = [[r["name"], r["meaning"]] for r in rows], ["NAME", "MEANING"]
    else:
        rows = devices()
        shown, headers = [[r["name"], r["title"]] for r in rows], ["NAME", "TITLE"]
    if ctx.json:
        ctx.emit(rows)
    else:
        click.echo(table(headers, shown))


def method_entry(method: Method, device: str, dtype: str = "", mode: str = "") -> dict[str, Any]:
    """One method as ``list methods --json`` prints it.

    Its impls are asked about the device's usual dtype and the method's first mode where none are given.
    """
    params = method.params()
    dims = Dims(
        seq_len=1024,
        num_layers=method.fewest_layers(params),
        causal=method.causal[0] if method.causal else False,
        position=method.positions[0],
    )
    dtype, mode = dtype or ("fp32" if device == "cpu" else "bf16"), mode or method.modes[0]
    impls = []
    for impl in method.impls:
        answer = method.impl_support(impl, mode, dims, params, device, dtype)
        impls.append({"name": impl.name, "supported": answer.ok, "reason": answer.reason, "note": impl.note})
    return {
        "name": method.name,
        "title": method.title or method.name,
        "family": method.family,
        "idea": method.idea,
        "memory_parameter": method.memory_parameter,
        "modes": list(method.modes),
        "causal": list(method.causal),
        "positions": list(method.positions),
        "paper": dataclasses.asdict(method.paper) if method.paper else None,
        "impls": impls,
    }


def devices() -> list[dict[str, Any]]:
    """The CPU, and the NVIDIA devices the driver names."""
    found = [{"name": "cpu", "title": cpu_title()}]
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no permission: no devices
        return found
    for index in range(pynvml.nvmlDeviceGetCount()):
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
        found.append({"name": f"cuda:{index}", "title": name if isinstance(name, str) else name.decode()})
    return found


def cpu_title() -> str:
    """Model name of the processor, as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _impls(entry: dict[str, Any]) -> str:
    return ",".join(impl["name"] if impl["supported"] else f"({impl['name']})" for impl in entry["impls"])


def _text(value: str | None) -> str:
    return value or "-"


def _print_broken(registry: Registry) -> None:
    for broken in registry.broken:
        click.echo(f"{broken.name}  could not be loaded: {broken.error}")
