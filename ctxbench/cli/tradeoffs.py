"""What ``ctxbench show`` says of a whole run: crossovers, the front of time and memory, lengths that fit."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxbench.axes import parse_size
from ctxbench.cli.common import Common, table
from ctxbench.errors import UserError
from ctxbench.units import format_bytes, format_seconds, format_tokens, parse_bytes

if TYPE_CHECKING:
    from ctxbench.analysis.crossover import Crossover
    from ctxbench.analysis.curves import Curve
    from ctxbench.analysis.pareto import Frontier, Point


def show(folder: Path, crossover: str | None, front: bool, limits: str | None, length: str | None, ctx: Common) -> None:
    """Print what was asked for, one table each."""
    from ctxbench.analysis.curves import best, curves
    from ctxbench.analysis.forecast import Forecaster
    from ctxbench.analysis.pareto import frontier, pareto
    from ctxbench.analysis.runs import read_run
    from ctxbench.cost.machine import built_in

    run = read_run(folder)
    for warning in run.warnings:
        ctx.note(warning)
    found = curves(run.rows)
    if not found:
        raise UserError(f"no cell of {run.name} was measured\n  `ctxbench show {folder}` says why")
    # Only fits and formulas are asked, which no ceiling enters.
    forecaster = Forecaster(ctx.registry(), built_in(run.rows[0].device, run.rows[0].threads), run.rows)
    answer: dict[str, Any] = {}
    if crossover:
        answer["crossovers"] = _crossovers(found, crossover, forecaster)
    if front:
        at = parse_size(length) if length else _usual(found)
        answer["pareto"] = pareto(found, at)
        if not answer["pareto"]:
            known = ", ".join(format_tokens(n) for n in sorted({row.seq_len for c in found for row in c.rows}))
            raise UserError(f"no peak was measured at {format_tokens(at)} tokens\n  lengths of this run: {known}")
    if limits:
        sizes = [parse_bytes(part) for part in limits.split(",")]
        answer["frontier"] = frontier(best(found), run.rows, forecaster, sizes)
    if ctx.json:
        ctx.emit(answer)
        return
    printers = {"crossovers": _print_crossovers, "pareto": _print_pareto, "frontier": _print_frontier}
    for name, value in answer.items():
        printers[name](value)  # type: ignore[operator]


def _crossovers(found: list[Curve], text: str, forecaster: Any) -> list[Crossover]:
    from ctxbench.analysis.crossover import crossovers
    from ctxbench.analysis.curves import choose

    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        names = sorted({curve.method for curve in found})
    if len(names) < 2:
        raise UserError(
            f"--crossover takes two or more methods, received {text!r}\n  accepted: A,B or METHOD/IMPL, or all"
        )
    sides = [choose(found, name) for name in names]
    return [each for a, b in itertools.combinations(sides, 2) for each in crossovers(a, b, forecaster)]


def _usual(found: list[Curve]) -> int:
    """The longest length that at least half of the methods reach."""
    counts = Counter(length for _, length in {(c.method, row.seq_len) for c in found for row in c.rows})
    most = max(counts.values())
    return max(length for length, count in counts.items() if 2 * count >= most)


def _print_crossovers(found: list[Crossover]) -> None:
    if not found:
        click.echo("no two of these share a setting and two lengths")
        return
    lines = []
    for each in found:
        a, b = _name(each.a, each.memory_a), _name(each.b, each.memory_b)
        over = f"{format_tokens(each.first)}..{format_tokens(each.last)}"
        if each.seq_len is None:
            lines.append([a, b, each.mode, "none: the first is faster", "", "", over])
            continue
        low = f"below {format_tokens(each.first)}" if each.low is None else _about(each.low)
        high = "beyond" if each.high is None else _about(each.high)
        if each.source == "forecast" and each.low is None:
            low = format_tokens(each.last)
        chance = "" if each.chance is None else f"{100 * each.chance:.0f} %"
        mark = " (forecast)" if each.source == "forecast" else ""
        lines.append([a, b, each.mode, _about(each.seq_len) + mark, f"{low} to {high}", chance, over])
    click.echo(
        table(["FASTER BELOW", "FASTER ABOVE", "MODE", "CROSSOVER", "90 % INTERVAL", "CHANCE", "MEASURED"], lines)
    )


def _print_pareto(found: list[Point]) -> None:
    click.echo(f"time and memory at {format_tokens(found[0].seq_len)} tokens")
    lines = [
        [
            point.verdict, point.label, point.setting["mode"], format_seconds(point.latency_s),
            f"{format_seconds(point.low)} to {format_seconds(point.high)}", format_bytes(point.peak_bytes),
            f"by {point.by}" if point.by else "",
        ]
        for point in found
    ]  # fmt: skip
    click.echo(table(["", "METHOD / IMPL", "MODE", "TIME", "INTERVAL", "PEAK", "BEATEN"], lines))


def _print_frontier(found: list[Frontier]) -> None:
    lines = [
        [
            each.label, each.setting["mode"], format_bytes(each.limit),
            "unknown" if each.by_formula is None else _about(each.by_formula), _about(each.measured),
            "-" if each.exceeded is None else format_tokens(each.exceeded),
            {None: "", True: "agree", False: "the formula fits what did not"}[each.consistent],
        ]
        for each in found
    ]  # fmt: skip
    click.echo(table(["METHOD / IMPL", "MODE", "LIMIT", "BY FORMULA", "MEASURED TO", "EXCEEDED AT", ""], lines))


def _name(label: str, memory: int | None) -> str:
    return label if memory is None else f"{label} ({format_tokens(memory)})"


def _about(length: float) -> str:
    """A length between measured ones: ``1.4k``."""
    if length < 1024:
        return str(round(length))
    unit, letter = (2**20, "m") if length >= 2**20 else (2**10, "k")
    value = length / unit
    return f"{value:.0f}{letter}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0") + letter
