"""``ctxbench show``: one run, or one cell with every sample, warning and traceback. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options, table
from ctxbench.errors import UserError
from ctxbench.rows import Row
from ctxbench.run.progress import describe
from ctxbench.text import explain
from ctxbench.units import format_bytes, format_flops, format_seconds, format_tokens

if TYPE_CHECKING:
    from ctxbench.analysis.carried import Carried
    from ctxbench.analysis.scaling import Scaling

SHOWN_SAMPLES = 20


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("cell", required=False)
@click.option("--crossover", metavar="A,B", help="Where one becomes faster than the other: METHOD or METHOD/IMPL; all.")
@click.option("--pareto", is_flag=True, help="What nobody beats in time and memory at one length.")
@click.option("--frontier", metavar="SIZES", help="The largest length below a memory limit: 1GiB,16GiB.")
@click.option("--seq", "length", metavar="SIZE", help="Length of --pareto. [the longest most curves reach]")
@common_options
def command(
    run: Path,
    cell: str | None,
    crossover: str | None,
    pareto: bool,
    frontier: str | None,
    length: str | None,
    ctx: Common,
) -> None:
    """Show the RUN folder, or one CELL of it: the beginning of its key, or METHOD/IMPL/LENGTH."""
    if crossover or pareto or frontier:
        if cell is not None:
            raise UserError(
                f"--crossover, --pareto and --frontier are about the whole run, received the cell {cell!r} too\n"
                "  accepted: a length of --pareto as --seq 16k; one cell without these options"
            )
        from ctxbench.cli.tradeoffs import show

        show(run, crossover, pareto, frontier, length, ctx)
        return
    from ctxbench.analysis.runs import read_run

    read = read_run(run)
    for warning in read.warnings:
        ctx.note(warning)
    rows, header = list(read.rows), read.info
    if cell is None:
        from ctxbench.analysis.carried import carried
        from ctxbench.analysis.scaling import scalings

        growth, kept = scalings(rows), carried(rows, ctx.registry())
        if ctx.json:
            ctx.emit({"run": header, "rows": rows, "scaling": growth, "carried": kept})
        else:
            _print_run(run, header, rows, ctx)
            _print_growth(growth, ctx)
            _print_carried(kept)
        return
    found = find(rows, cell)
    if ctx.json:
        ctx.emit(found)
        return
    for row in found:
        _print_cell(row, ctx)


def find(rows: list[Row], text: str) -> list[Row]:
    """The rows a user means: by the beginning of the key, or by method, impl and length.

    Raises:
        UserError: when nothing matches.
    """
    found = [row for row in rows if row.cell.startswith(text)]
    if not found:
        parts = text.split("/")
        found = [row for row in rows if all(part in _names(row) for part in parts)]
    if not found:
        raise UserError(
            f"no cell {text!r} in this run\n  accepted: the beginning of a key, or METHOD/IMPL/LENGTH such as "
            "dense/blocked/4k\n  `ctxbench show RUN` lists all cells"
        )
    return found


def _names(row: Row) -> tuple[str, ...]:
    return row.method, row.impl, row.mode, str(row.seq_len), format_tokens(row.seq_len)


def _print_run(run: Path, header: Mapping[str, Any], rows: list[Row], ctx: Common) -> None:
    """One line a cell; without -v one for all lengths at which an impl is unsupported for one reason."""
    click.echo(f"{run}  suite {header.get('suite', '?')}  {header.get('status', 'unknown')}")
    click.echo(f"{header.get('command', '')}")
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        alone = ctx.verbose or row.status != "unsupported"
        key = row.cell if alone else (row.method, row.impl, row.memory, row.mode, row.dtype, row.reason)
        groups.setdefault(key, []).append(row)
    lines = []
    for group in groups.values():
        row, lengths = group[0], [format_tokens(each.seq_len) for each in group]
        latency = row.latency_s
        lines.append(
            [
                row.cell if len(group) == 1 else f"{len(group)} cells",
                f"{row.method} / {row.impl}",
                lengths[0] if len(group) == 1 else f"{lengths[0]} to {lengths[-1]}",
                format_tokens(row.memory),
                row.mode,
                row.dtype,
                row.status,
                format_seconds(latency.median if latency else None),
                format_bytes(row.peak_bytes.allocated if row.peak_bytes else None),
                row.reason.splitlines()[0] if row.reason else "",
            ]
        )
    if lines:
        headers = ["CELL", "METHOD / IMPL", "LENGTH", "MEMORY", "MODE", "DTYPE", "STATUS", "TIME", "PEAK", "REASON"]
        click.echo(table(headers, lines))
    if len(groups) < len(rows):
        click.echo(f"{len(rows)} cells; unsupported ones of one impl and reason share a line (-v lists each)")


def _print_growth(growth: list[Scaling], ctx: Common) -> None:
    """Exponents of time in the length; with -v also from each length to the next."""
    from ctxbench.analysis.scaling import power

    if not growth:
        return
    lines = []
    for scaling in growth:
        tail = scaling.tail
        name = [f"{scaling.method} / {scaling.impl}", format_tokens(scaling.memory), scaling.mode, scaling.dtype]
        lines.append(
            [
                *name,
                f"{format_tokens(scaling.lengths[0])} to {format_tokens(scaling.lengths[-1])}",
                scaling.text,
                scaling.formula_text or "-",
                f"{power(tail)} {'from' if tail.first < tail.last else 'at'} {format_tokens(tail.first)}",
            ]
        )
        for step in scaling.steps if ctx.verbose else []:
            reach = f"  {format_tokens(step.first)} to {format_tokens(step.last)}"
            formula = "-" if step.formula is None else f"T^{step.formula:.2f}"
            lines.append(["", "", "", "", reach, power(step), formula, ""])
    click.echo("\ngrowth of time with the length, with 95 % intervals")
    headers = ["METHOD / IMPL", "MEMORY", "MODE", "DTYPE", "LENGTHS", "TIME", "FORMULA", "LAST LENGTHS"]
    click.echo(table(headers, lines))


def _print_carried(kept: list[Carried]) -> None:
    """What one token costs after a context, and what is kept of it: at up to four lengths, and flat or linear."""
    from ctxbench.analysis.carried import NEAR, columns

    for mode in dict.fromkeys(each.mode for each in kept):
        series = [each for each in kept if each.mode == mode]
        shown = columns(series)
        what = "one token after a context" if mode == "decode" else "a token of a sequence read segment by segment"
        click.echo(f"\n{what}: time, and bytes that stay (flat, linear: an exponent within {NEAR} of 0, 1)")
        lines = [line for each in series for line in _carried_lines(each, shown)]
        click.echo(table(["METHOD / IMPL", "DTYPE", "", *map(format_tokens, shown), "GROWTH"], lines))


def _carried_lines(each: Carried, shown: list[int]) -> list[list[str]]:
    """One line of time, of state, of the peak."""
    at = [each.lengths.index(length) if length in each.lengths else None for length in shown]
    names = [[f"{each.method} / {each.impl}", each.dtype], ["", ""], ["", ""]]
    parts = (
        ("time", [format_seconds(value) for value in each.token_s], each.time_text),
        ("state", [format_bytes(value) for value in each.state_bytes], each.state_text),
        ("peak", [format_bytes(value) for value in each.peak_bytes], each.peak_text),
    )
    return [
        [*name, what, *("-" if index is None else texts[index] for index in at), grows or "-"]
        for name, (what, texts, grows) in zip(names, parts, strict=True)
    ]


def _print_cell(row: Row, ctx: Common) -> None:
    echo = click.echo
    echo(f"{row.cell}  {describe(row)}")
    echo(f"  status     {row.status}{f': {row.reason}' if row.reason else ''}")
    sizes = ("batch_size", "d_model", "num_heads", "num_layers", "d_ff", "causal", "position", "memory", "threads")
    echo(f"  sizes      {', '.join(f'{name} {getattr(row, name)}' for name in sizes)}")
    if row.params:
        echo(f"  params     {', '.join(f'{name} {value}' for name, value in row.params.items())}")
    if row.picked is not None:
        echo(f"  picked     by {row.picked.asked}: {row.picked}")
    if row.gate is not None:
        probes = ", ".join(f"{name} {result}" for name, result in row.gate.probes.items())
        passed = "passed" if row.gate.ok else "failed"
        echo(f"  gate       {passed}; error {row.gate.error}, tolerance {row.gate.tolerance}; {probes}")
    if row.latency_s is not None:
        latency = row.latency_s
        low, high = format_seconds(latency.low), format_seconds(latency.high)
        echo(f"  latency    {format_seconds(latency.median)} ({low} to {high})")
        for index, samples in enumerate(latency.samples):
            shown = samples if ctx.verbose else samples[:SHOWN_SAMPLES]
            more = f" ... {len(samples) - len(shown)} more (-v)" if len(samples) > len(shown) else ""
            stop = latency.stop[index] if index < len(latency.stop) else ""
            mark = ", contended" if index < len(latency.contended) and latency.contended[index] else ""
            echo(f"    process {index}: stopped by {stop}{mark}; {' '.join(format_seconds(s) for s in shown)}{more}")
    if row.peak_bytes is not None:
        peak = row.peak_bytes
        for name in ("allocated", "resident", "traced", "formula"):
            echo(f"  peak, {name:<10}{format_bytes(getattr(peak, name))}")
    if row.flops is not None:
        for name in ("algorithmic", "formula", "counted"):
            count = getattr(row.flops, name)
            echo(f"  FLOPs, {name:<12}{format_flops(count)}{f' ({count})' if count is not None else ''}")
    if row.forecast is not None:
        expected = row.forecast
        seconds, peak_bytes = format_seconds(expected.latency_s), format_bytes(expected.peak_bytes)
        echo(f"  forecast   {seconds}, peak {peak_bytes}; {expected.basis}")
    for warning in row.warnings:
        echo(f"  warning    {explain(warning)}")
    if row.detail:
        echo("  detail")
        echo("\n".join(f"    {line}" for line in row.detail.splitlines()))
    if ctx.verbose:
        echo(msgspec.json.format(msgspec.json.encode(row.env_delta), indent=2).decode())
