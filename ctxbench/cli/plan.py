"""``ctxbench plan``: what would run, how much it costs, why the rest would not. Never imports torch."""

from __future__ import annotations

from collections import Counter, defaultdict

import click

from ctxbench.cli.common import Common, common_options, table
from ctxbench.cli.selection import configure, print_config, selection_options, shard_option
from ctxbench.config import Config
from ctxbench.pace import Pace, within_budget
from ctxbench.plan import Plan, Planned, as_row_fields, build
from ctxbench.registry import Registry
from ctxbench.run.session import load_ceilings
from ctxbench.suite import Suite
from ctxbench.units import format_bytes, format_flops, format_seconds, format_tokens


@click.command()
@selection_options
@shard_option
@common_options
def command(suite: str | None, flags: Suite, print_config: bool, shard: str, ctx: Common) -> None:
    """Show the cells of SUITE (default quick; scaling when --seq or --methods is given) with forecasts and reasons."""
    registry = ctx.registry()
    config = configure(suite, flags, registry, shard)
    if print_config:
        show_config(config, ctx)
    else:
        show_plan(config, registry, ctx)


def show_plan(config: Config, registry: Registry, ctx: Common) -> None:
    """Print the plan of a configuration."""
    plan = build(config, registry, load_ceilings(config))
    fitting = {planned.cell.key for planned in within_budget(plan)}
    for planned in plan.cells:
        if planned.status == "planned" and planned.cell.key not in fitting:
            planned.status = "skipped"
            planned.reason = f"forecast total is above the budget of {format_seconds(config.budget_s)}"
    chosen = [planned for planned in plan.cells if planned.status == "planned"]
    predicted_s = min(Pace(config).total(chosen), config.budget_s)
    if ctx.json:
        ctx.emit(
            {
                "suite": config.suite,
                "shard": config.shard,
                "whole": plan.whole,
                "seq_len": config.seq_len,
                "calibrated": plan.ceilings.calibrated,
                "predicted_s": predicted_s,
                "budget_s": config.budget_s,
                "counts": plan.counts(),
                "cells": [as_row_fields(planned) for planned in plan.cells],
            }
        )
        return
    _print(plan, predicted_s, ctx)


def _print(plan: Plan, predicted_s: float, ctx: Common) -> None:
    config = plan.config
    rows = [_line(planned) for planned in plan.cells if planned.status == "planned" or ctx.verbose]
    if rows:
        click.echo(table(["METHOD / IMPL", "LENGTH", "MEMORY", "MODE", "DTYPE", "FLOPS", "TIME", "PEAK", ""], rows))
        click.echo()
    _print_picks(plan)
    reasons = Counter((planned.status, _kind(planned)) for planned in plan.cells if planned.status != "planned")
    for (status, reason), count in reasons.most_common():
        click.echo(f"{count:>4} {status}: {reason}")
    if reasons and not ctx.verbose:
        click.echo("     (-v lists them)")
    counts = plan.counts()
    part = f"part {config.shard} of {plan.whole} cells; " if config.shard else ""
    click.echo(
        f"{counts.get('planned', 0)} of {len(plan.cells)} cells in about {format_seconds(predicted_s)}, budget "
        f"{format_seconds(config.budget_s)}; {part}suite {config.suite}; lengths "
        f"{', '.join(format_tokens(length) for length in config.seq_len)}"
    )
    if not plan.ceilings.calibrated:
        click.echo(
            "forecasts are uncalibrated: they rest on built-in ceilings until the first run measures this machine"
        )


def _print_picks(plan: Plan) -> None:
    """What ``auto`` came to and why, one line for all cells with the same answer."""
    cells: dict[str, list[str]] = defaultdict(list)
    for planned in plan.cells:
        if planned.picked is not None:
            cells[f"{planned.cell.impl}: {planned.picked}"].append(planned.cell.method)
    for answer, methods in cells.items():
        click.echo(f"{len(methods):>4} auto: {answer} [{', '.join(dict.fromkeys(methods))}]")


def _line(planned: Planned) -> list[str]:
    cell, expected = planned.cell, planned.forecast
    return [
        cell.label(),
        format_tokens(cell.seq_len),
        format_tokens(cell.memory),
        cell.mode,
        cell.dtype,
        format_flops(planned.figures.flops if planned.figures else None),
        format_seconds(expected.latency_s),
        format_bytes(expected.peak_bytes),
        f"{planned.status}: {planned.reason}" if planned.status != "planned" else planned.formula_error,
    ]


def _kind(planned: Planned) -> str:
    """A reason without the numbers that differ from cell to cell."""
    reason = planned.reason
    if reason.startswith("forecast of"):
        limit = "memory limit" if "memory limit" in reason else "cell timeout"
        return f"forecast above the {limit}"
    return f"{planned.cell.method}: {reason}" if planned.status == "unsupported" else reason


def show_config(config: Config, ctx: Common) -> None:
    """Print the merged configuration."""
    print_config(config, ctx)
