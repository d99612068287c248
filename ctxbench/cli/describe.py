"""``ctxbench describe``: what a method is, what it costs by formula, and how that grows. Never imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from ctxbench import suite as suites
from ctxbench.axes import parse_sizes
from ctxbench.cli.common import Common, common_options, complete_methods
from ctxbench.cli.described import print_method
from ctxbench.cli.listing import method_entry
from ctxbench.devices import parse_devices
from ctxbench.errors import UserError, unknown
from ctxbench.method import DTYPE_BYTES, DTYPES, MODES, Dims, Method, Params


@click.command()
@click.argument("name", shell_complete=complete_methods)
@click.option("--seq", default="1k,8k,64k", show_default=True, help="Sizes at which the formulas are evaluated.")
@click.option("--mode", type=click.Choice(MODES), default="forward", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True)
@click.option(
    "--params", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the method (repeatable)."
)
@click.option("--latex", is_flag=True, help="Print formulas as LaTeX.")
@click.option("--device", default="cpu", help="Device that support is asked for.")
@common_options
def command(
    name: str, seq: str, mode: str, dtype: str, settings: tuple[str, ...], latex: bool, device: str, ctx: Common
) -> None:
    """Describe a METHOD (formulas, big-O, numbers, parameters, paper, support) or a SUITE (its axes and limits)."""
    registry = ctx.registry()
    (device,) = parse_devices([device])
    if name not in registry.entries and _describe_suite(name, ctx):
        return
    if name not in {*registry.entries, *(broken.name for broken in registry.broken)}:
        raise unknown("method or suite", name, [*registry.entries, *suites.names()], "see `ctxbench list`")
    method = registry[name]
    description = describe(method, seq, mode, dtype, settings, device)
    if ctx.json:
        ctx.emit(description)
    else:
        print_method(description, latex)


def describe(
    method: Method, seq: str, mode: str, dtype: str, settings: tuple[str, ...] = (), device: str = "cpu"
) -> dict[str, Any]:
    """Everything ``describe --json`` prints about one method."""
    params = read_params(method, settings)
    causal = method.causal[0] if method.causal else False
    dims = Dims(seq_len=1, num_layers=method.fewest_layers(params), causal=causal, position=method.positions[0])
    lengths = parse_sizes(seq)
    support = method.mode_support(mode, dims.replace(seq_len=max(lengths)), params)
    costs = []
    if support:
        for impl in method.impls:
            if impl.modes and mode not in impl.modes:
                continue
            try:
                cost = method.cost_of(impl.name, mode, causal, dims.position, params)
                if cost is not None:
                    costs.append(_cost_entry(method, impl.name, cost, dims, params, DTYPE_BYTES[dtype], lengths))
            except Exception as error:  # a plug-in's cost function may raise anything
                costs.append({"impl": impl.name, "trouble": f"{type(error).__name__}: {error}"})
    return {
        **method_entry(method, device, dtype, mode),
        "device": device,
        "params": [_param_entry(spec, params) for spec in dataclasses.fields(params)],
        "mode": mode,
        "mode_supported": support.ok,
        "mode_reason": support.reason,
        "without": dict(method.without),
        "without_positions": dict(method.without_positions),
        "dims": dataclasses.asdict(dims),
        "dtype": dtype,
        "costs": costs,
        "picks": [
            {"impl": pick.impl, "where": pick.condition, "why": pick.why, "measured": pick.measured}
            for pick in method.picks
        ],
        "deviations": list(method.deviations),
        "claims": [dataclasses.asdict(claim) for claim in method.claims],
        "equals": [f"{rule.when}: {rule.other}" for rule in method.equals],
        "defects": {impl.name: dict(impl.defects) for impl in method.impls if impl.defects},
    }


def read_params(method: Method, settings: tuple[str, ...]) -> Params:
    """Parse ``name=value`` settings against the method's own parameters."""
    fields = {spec.name: spec for spec in dataclasses.fields(method.params)}
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.removeprefix(f"{method.name}.")
        if not equals:
            raise UserError(f"malformed parameter {setting!r}\n  accepted: NAME=VALUE, for example window=256")
        if name not in fields:
            raise unknown(f"parameter of {method.name}", name, fields)
        changes[name] = convert(text, type(fields[name].default), setting)
    try:
        return method.params(**changes)
    except ValueError as error:
        raise UserError(f"{method.name}: {error}") from None


def convert(text: str, kind: type, setting: str) -> Any:
    """Text of a parameter as the type its default has; integers take the size grammar (``1k``)."""
    from ctxbench.axes import parse_size

    if kind is bool:
        values = {
            "true": True,
            "false": False,
            "yes": True,
            "no": False,
            "1": True,
            "0": False,
            "on": True,
            "off": False,
        }
        if text.lower() not in values:
            raise UserError(f"malformed value in {setting!r}\n  accepted: true or false")
        return values[text.lower()]
    if kind is int:
        return int(text) if text.lstrip("-").isdigit() else parse_size(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise UserError(f"malformed value in {setting!r}\n  accepted: a number") from None
    return text


def _cost_entry(
    method: Method, impl: str, cost: Any, dims: Dims, params: Params, itemsize: int, lengths: tuple[int, ...]
) -> dict[str, Any]:
    from ctxbench.cost import big_o, evaluate, latex, local_slope, symbols, total
    from ctxbench.cost.branch import branch
    from ctxbench.cost.model import plain, text

    formulas = {
        "algorithmic": total(cost.algorithmic),
        "flops": total(cost.flops),
        "peak_bytes": cost.peak_bytes,
        "state_bytes": cost.state_bytes,
        "num_parameters": cost.num_parameters,
        "depth": cost.depth,
    }
    formulas = {name: formula for name, formula in formulas.items() if formula is not None}
    at = []
    for length in lengths:
        values = symbols.bindings(dims.replace(seq_len=length), params, itemsize, method.segment_len(params))
        numbers: dict[str, Any] = {name: evaluate(formula, values) for name, formula in formulas.items()}
        near = {name: plain(branch(formula, values)) for name, formula in formulas.items()}
        at.append({"seq_len": length, **numbers, "slope": local_slope(formulas["flops"], values), "near": near})
    return {
        "impl": impl,
        "terms": {name: {"text": text(term), "latex": latex(term)} for name, term in cost.flops.items()},
        "formulas": {
            name: {"text": text(formula), "latex": latex(formula), "big_o": big_o(formula)}
            for name, formula in formulas.items()
        },
        "at": at,
    }


def _param_entry(spec: dataclasses.Field[Any], params: Params) -> dict[str, Any]:
    keep = {name: spec.metadata.get(name) for name in ("help", "unit", "low", "high", "source")}
    choices = list(spec.metadata.get("choices", ()))
    return {"name": spec.name, "value": getattr(params, spec.name), "default": spec.default, "choices": choices, **keep}


def _describe_suite(name: str, ctx: Common) -> bool:
    if name not in suites.names() and not name.endswith(".toml"):
        return False
    import msgspec

    loaded = msgspec.to_builtins(suites.load_suite(name))
    if ctx.json:
        ctx.emit(loaded)
        return True
    for section, content in loaded.items():
        if not isinstance(content, dict):
            click.echo(f"{section}: {content}")
            continue
        click.echo(f"[{section}]")
        for key, value in content.items():
            if value not in (None, [], {}, ""):
                click.echo(f"  {key} = {value}")
    return True
