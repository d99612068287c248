"""``ctxbench audit``: what methods, runs and the source documents claim against what is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctxbench.axes import parse_sizes
from ctxbench.cli.common import Common, common_options, complete_methods
from ctxbench.errors import Exit, UserError, unknown
from ctxbench.units import format_tokens

if TYPE_CHECKING:
    from rich.table import Table

    from ctxbench.analysis.audit import Verdict
    from ctxbench.analysis.audit_table import Entry, Size
    from ctxbench.registry import Registry

STYLE = {"holds": "green", "violated": "bold red", "not claimed": "yellow", "not applicable": "dim"}


@click.command()
@click.argument("subject", required=False, metavar="METHOD|all|RUN", shell_complete=complete_methods)
@click.option("--impl", help="Audit this implementation of METHOD alone.")
@click.option("--table", "table_", is_flag=True, help="Audit the complexity table of the first source document.")
@click.option("--seq", metavar="SIZE", help="With --table: the length it is evaluated at. Default 8k.")
@common_options
def command(subject: str | None, impl: str | None, table_: bool, seq: str | None, ctx: Common) -> Exit:
    """Hold every declared term against what is seen, with a verdict each; exit code 1 where one is violated.

    A METHOD is audited without a run: the laws of `ctxbench check`, and traces at 2k to 8k tokens. A RUN folder is
    audited by its rows: formulas against counted FLOPs, traced and allocated peaks, state and parameters, the gate's
    probes, and measured growth against declared growth. Verdicts: holds, violated, not claimed, not applicable.
    """
    if table_ == (subject is not None):
        raise UserError(
            f"audit takes a METHOD, a RUN or --table, received {'both' if table_ else 'none of them'}\n"
            "  for example: ctxbench audit dense; ctxbench audit runs/ID; ctxbench audit --table"
        )
    if not table_ and seq is not None:
        raise UserError("--seq belongs to --table\n  a METHOD is traced at fixed lengths, a RUN has its own")
    if impl is not None and table_:
        raise UserError("--impl belongs to a METHOD\n  accepted with --table: --seq")
    registry = ctx.registry()
    if subject is None:
        return _audit_table(seq, registry, ctx)
    if _is_run(subject, registry):
        if impl is not None:
            raise UserError("--impl belongs to a METHOD\n  a RUN is audited whole; --json can be filtered")
        return _audit_run(Path(subject), registry, ctx)
    return _audit_methods(subject, impl, registry, ctx)


def _is_run(subject: str, registry: Registry) -> bool:
    """A name of a method is a method; anything else that is on disk, or looks like a path, is a run."""
    return subject not in registry.names() and (Path(subject).exists() or "/" in subject or "\\" in subject)


def _audit_methods(names: str, impl: str | None, registry: Registry, ctx: Common) -> Exit:
    from ctxbench.analysis.audit_method import audit_method
    from ctxbench.cost.trace import trace
    from ctxbench.testing import check_method

    chosen = registry.select(names)
    for method in chosen:
        known = [each.name for each in method.impls]
        if impl is not None and impl not in known:
            raise unknown(f"impl of {method.name}", impl, known)
    found: list[Verdict] = []
    for method in chosen:
        report = check_method(method, impl)
        mine = audit_method(method, report.findings, trace, impl)
        found += mine
        if not ctx.json and not ctx.quiet:
            ctx.console().print(_table(mine))
    return _finish(names, found, ctx)


def _audit_run(folder: Path, registry: Registry, ctx: Common) -> Exit:
    from ctxbench.analysis.audit_rows import audit_rows
    from ctxbench.analysis.runs import read_run

    run = read_run(folder)
    for warning in run.warnings:
        ctx.note(f"{run.name}: {warning}")
    found = audit_rows(run.rows, {method.name: method for method in registry})
    if not ctx.json and not ctx.quiet:
        ctx.console().print(_table(found) if ctx.verbose else _overview(found))
        if not ctx.verbose and (silent := _silent(found)):
            click.echo(f"\nnone of their cells ran, so nothing is claimed of them (-v lists it): {silent}")
    return _finish(str(folder), found, ctx)


def _finish(subject: str, found: Sequence[Verdict], ctx: Common) -> Exit:
    """Contradictions in full, then one line; the exit code."""
    from rich.text import Text

    from ctxbench.analysis.audit import VERDICTS, violated

    wrong = violated(found)
    if ctx.json:
        ctx.emit({"subject": subject, "ok": not wrong, "verdicts": found})
        return Exit.CELLS_FAILED if wrong else Exit.OK
    console = ctx.console()
    for verdict in wrong:
        where = "/".join(filter(None, (verdict.method, verdict.impl, verdict.mode)))
        console.print(Text(f"\n{verdict.term} [{where}] is violated", "bold red"))
        if verdict.claimed or verdict.seen:
            console.print(Text(f"  claimed {verdict.claimed or 'that it holds'}, seen {verdict.seen}"))
        console.print(Text(f"  {verdict.evidence}"))
    counts = ", ".join(f"{sum(each.verdict == name for each in found)} {name}" for name in VERDICTS)
    click.echo(f"\n{subject}: {counts}")
    return Exit.CELLS_FAILED if wrong else Exit.OK


def _table(found: Sequence[Verdict]) -> Table:
    """One line a term."""
    from rich.table import Table
    from rich.text import Text

    table = Table("impl", "term", "verdict", "claimed", "seen", "evidence", box=None, pad_edge=False)
    for verdict in found:
        where = "/".join(filter(None, (verdict.method, verdict.impl, verdict.mode)))
        evidence = verdict.evidence if verdict.ok else "see below"
        cells = (verdict.claimed, verdict.seen, evidence)
        table.add_row(Text(where), Text(verdict.term), Text(verdict.verdict, STYLE[verdict.verdict]), *map(Text, cells))
    return table


def _overview(found: Sequence[Verdict]) -> Table:
    """One line an impl and mode of which anything is known: how many terms hold, and the names of those that do not."""
    from rich.table import Table
    from rich.text import Text

    from ctxbench.analysis.audit import HOLDS, VIOLATED

    table = Table("method", "impl", "mode", "hold", "violated", "not claimed or applicable", box=None, pad_edge=False)
    for names, mine in _groups(found).items():
        if not _decided(mine):
            continue
        wrong = ", ".join(each.term for each in mine if each.verdict == VIOLATED)
        rest = ", ".join(each.term for each in mine if each.verdict not in (HOLDS, VIOLATED))
        held = sum(each.verdict == HOLDS for each in mine)
        table.add_row(
            *map(Text, names), Text(str(held)), Text(wrong or "-", "bold red" if wrong else ""), Text(rest, "dim")
        )
    return table


def _silent(found: Sequence[Verdict]) -> str:
    """Impls none of whose cells ran, by method: ``dense flash, triton; rmt graph``."""
    silent: dict[str, list[str]] = {}
    for (method, impl, _), mine in _groups(found).items():
        if not _decided(mine) and impl not in silent.setdefault(method, []):
            silent[method].append(impl)
    return "; ".join(f"{method} {', '.join(impls)}" for method, impls in silent.items() if impls)


def _decided(found: Sequence[Verdict]) -> bool:
    """Whether any of these terms holds or is violated."""
    from ctxbench.analysis.audit import HOLDS, VIOLATED

    return any(each.verdict in (HOLDS, VIOLATED) for each in found)


def _groups(found: Sequence[Verdict]) -> dict[tuple[str, str, str], list[Verdict]]:
    """Verdicts of each impl in each mode."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    for verdict in found:
        groups.setdefault((verdict.method, verdict.impl, verdict.mode), []).append(verdict)
    return groups


def _audit_table(seq: str | None, registry: Registry, ctx: Common) -> Exit:
    from ctxbench.analysis.audit import VIOLATED
    from ctxbench.analysis.audit_table import Size, audit_table
    from ctxbench.cost.trace import trace

    size = Size()
    if seq is not None:
        lengths = parse_sizes(seq)
        if len(lengths) != 1 or lengths[0] < 2:
            raise UserError(f"malformed --seq {seq!r}\n  accepted: one length of at least 2 tokens, such as 8k")
        size = Size(seq_len=lengths[0])
    entries = audit_table(registry, trace, size)
    wrong = [entry for entry in entries if entry.verdict == VIOLATED]
    if ctx.json:
        ctx.emit({"size": dataclasses.asdict(size), "ok": not wrong, "entries": entries})
    else:
        _print_entries(entries, size, ctx)
    return Exit.CELLS_FAILED if wrong else Exit.OK


def _print_entries(entries: Sequence[Entry], size: Size, ctx: Common) -> None:
    from rich.table import Table
    from rich.text import Text

    console = ctx.console()
    console.print(Text(f"The first source document's complexity table at {format_tokens(size.seq_len)}: {size}"))
    console.print(Text("memory in elements, compute in FLOPs, forward, batch 1; ratio is claimed / true\n"))
    table = Table("entry", "claimed", "as written", "true", "ratio", "verdict", "why", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(
            Text(f"{entry.name} {entry.quantity}"),
            Text(f"{entry.claimed:.3g} {entry.claimed_growth}"),
            Text("-" if entry.as_written is None else f"{entry.as_written:.3g} {entry.written_growth}"),
            Text("-" if entry.true is None else f"{entry.true:.3g} {entry.true_growth}"),
            Text("-" if entry.ratio is None else f"{entry.ratio:.2g}"),
            Text(entry.verdict, STYLE[entry.verdict]),
            Text(f"{entry.evidence} ({entry.basis})" if entry.basis else entry.evidence),
        )
    console.print(table)
