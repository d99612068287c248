"""Options that ``plan`` and ``run`` share: what to measure, where to stop, how to measure. Flags become one layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from ctxbench import suite as suites
from ctxbench.cli.common import Common, complete_methods
from ctxbench.config import Config, resolve
from ctxbench.errors import UserError
from ctxbench.registry import Registry
from ctxbench.shard import parse as parse_shard
from ctxbench.suite import Axes, Limits, Protocol, Suite

SELECTION = (
    ("--methods", "methods", "LIST", "all, a,b, family:NAME, -a (all but a)."),
    (
        "--impls",
        "impls",
        "LIST",
        "all, names, -NAME, auto (one impl for each method, device, dtype, mode and shape, with the reason), or "
        "supported: all that run on this machine, without rows for the rest.",
    ),
    ("--seq", "seq_len", "SIZES", "Lengths: 1k..128k doubles, 1k..128k*4, 1k..8k+1k, 1k,3k,10k."),
    ("--memory", "memory", "SIZES", "Memory sizes, for the parameter each method names; see `ctxbench list`."),
    ("--mode", "mode", "LIST", "forward, train, stream, decode."),
    ("--dtype", "dtype", "LIST", "fp32, bf16, fp16, fp64; default fp32 on CPU, bf16 on CUDA."),
    ("--device", "device", "LIST", "cpu, cuda, cuda:1; default cuda where there is one."),
    ("--batch", "batch_size", "SIZES", "Sequences a batch."),
    ("--d-model", "d_model", "SIZES", "Width."),
    ("--heads", "num_heads", "SIZES", "Heads."),
    ("--layers", "num_layers", "SIZES", "Layers; default the fewest a method can have."),
    ("--d-ff", "d_ff", "SIZES", "Width of the feed-forward network; 0 leaves it out; default 4 d_model."),
    ("--position", "position", "LIST", "Position encoding; default each method's own."),
)
SETTINGS = (
    ("--params", "params", "METHOD.NAME=VALUE", "A parameter of a method (repeatable)."),
    ("--axis", "extra", "NAME=SPEC", "An axis, or a parameter of all methods that have it (repeatable)."),
)
LIMITS = (
    ("--budget", "budget", "TIME", "The run ends inside this: 10m, 90s, 2h. Default 10m on CPU, 9m on CUDA."),
    ("--cell-timeout", "cell_timeout", "TIME", "Limit of one process of a cell. Default 60s."),
    ("--memory-limit", "memory_limit", "SIZE", "Limit of one process: 16GiB, or 80% of what is available."),
)
PROTOCOL_TEXTS = (("--precision", "precision", "PERCENT", "Half width of the interval to reach, such as 2%."),)
PROTOCOL_COUNTS = (
    ("--processes", "processes", "Timing processes a cell."),
    ("--min-samples", "min_samples", "Fewest samples a process."),
    ("--threads", "threads", "CPU threads of a measuring process; 0 means all cores."),
    ("--seed", "seed", "Seed of weights, inputs and the order of measuring."),
)


def selection_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the suite argument and all shared options; the function receives ``suite`` and ``flags: Suite``."""
    decorators = [click.argument("suite", required=False, shell_complete=complete_suites)]
    for flag, name, metavar, help_ in SELECTION:
        complete = complete_methods if name == "methods" else None
        decorators.append(click.option(flag, f"axes_{name}", metavar=metavar, help=help_, shell_complete=complete))
    direction = "Direction; default each method's own."
    decorators.append(click.option("--causal/--bidirectional", "axes_causal", default=None, help=direction))
    for flag, name, metavar, help_ in SETTINGS:
        decorators.append(click.option(flag, name, multiple=True, metavar=metavar, help=help_))
    for flag, name, metavar, help_ in LIMITS:
        decorators.append(click.option(flag, f"limits_{name}", metavar=metavar, help=help_))
    decorators.append(click.option("--max-flops", "limits_max_flops", type=float, help="FLOPs of a call."))
    for flag, name, metavar, help_ in PROTOCOL_TEXTS:
        decorators.append(click.option(flag, f"protocol_{name}", metavar=metavar, help=help_))
    for flag, name, help_ in PROTOCOL_COUNTS:
        decorators.append(click.option(flag, f"protocol_{name}", type=int, help=help_))
    decorators.append(click.option("--no-gate", "no_gate", is_flag=True, help="Time without the correctness gate."))
    decorators.append(click.option("--print-config", is_flag=True, help="Print every setting and where it comes from."))

    @functools.wraps(function)
    def wrapper(
        suite: str | None, params: tuple[str, ...], extra: tuple[str, ...], no_gate: bool, **values: Any
    ) -> Any:
        flags = _flags(values, params, extra, no_gate)
        rest = {name: value for name, value in values.items() if not name.startswith(("axes_", "limits_", "protocol_"))}
        return function(suite=suite, flags=flags, **rest)

    decorated: Callable[..., Any] = wrapper
    for decorator in reversed(decorators):
        decorated = decorator(decorated)
    return decorated


def configure(suite: str | None, flags: Suite, registry: Registry, shard: str = "") -> Config:
    """Merge and check all layers."""
    name, stack = suites.layers(suite, flags, Path.cwd())
    return msgspec.structs.replace(resolve(name, stack, registry), shard=shard)


def print_config(config: Config, ctx: Common) -> None:
    """Every setting as it was written, with the layer it comes from."""
    if ctx.json:
        ctx.emit({key: {"value": value, "origin": config.origins[key]} for key, value in config.merged.items()})
        return
    width = max(len(key) for key in config.merged)
    for key, value in config.merged.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        click.echo(f"{key:<{width}}  {text:<24}  # {config.origins[key]}")


def shard_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--shard``; the function receives ``shard: str``, empty for the whole plan."""
    help_ = (
        "Part I of N of the plan, balanced by predicted cost, for N machines of one kind; `ctxbench merge` joins them."
    )

    def checked(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
        return str(parse_shard(value)) if value else ""

    decorated: Callable[..., Any] = click.option("--shard", metavar="I/N", default="", callback=checked, help=help_)(
        function
    )
    return decorated


def complete_suites(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion of suite names."""
    return [name for name in suites.names() if name.startswith(incomplete)]


def _flags(values: dict[str, Any], params: tuple[str, ...], extra: tuple[str, ...], no_gate: bool) -> Suite:
    axes = _section(values, "axes_")
    settings: dict[str, Any] = dict(_assignment(text, "--params", "transformer_xl.mem_len=1k") for text in params)
    for text in extra:
        name, spec = _assignment(text, "--axis", "window=256,512")
        name = {"seq": "seq_len", "batch": "batch_size", "heads": "num_heads", "layers": "num_layers"}.get(name, name)
        if name in Axes.__struct_fields__:
            axes[name] = spec
        else:
            settings[name] = spec
    protocol = _section(values, "protocol_") | ({"gate": False} if no_gate else {})
    return Suite(
        axes=Axes(**axes), params=settings, limits=Limits(**_section(values, "limits_")), protocol=Protocol(**protocol)
    )


def _section(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix) and value is not None
    }


def _assignment(text: str, flag: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UserError(f"malformed {flag} {text!r}\n  accepted: NAME=VALUE, for example {flag} {example}")
    return name.strip(), value.strip()
