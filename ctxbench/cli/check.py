"""``ctxbench check``: the conformance kit on one method, or on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from rich.text import Text

from ctxbench.cli.common import Common, common_options, complete_methods, table
from ctxbench.errors import Exit, unknown
from ctxbench.method import Method

if TYPE_CHECKING:
    from ctxbench.testing import Finding, Report

STYLE = {"held": "green", "violated": "bold red", "not claimed": "yellow", "not applicable": "dim"}


@click.command()
@click.argument("methods", metavar="METHOD|all", shell_complete=complete_methods)
@click.option("--impl", help="Check this implementation alone.")
@click.option("--every", is_flag=True, help="Ask all laws of every crossing of settings, directions and positions.")
@click.option("--forms", is_flag=True, help="Check nothing: list what is tried of each form, and why not the rest.")
@common_options
def command(methods: str, impl: str | None, every: bool, forms: bool, ctx: Common) -> Exit:
    """Check that methods keep the laws every method must keep; exit code 4 where one is broken.

    Laws: shapes, determinism, batch independence, causality, receptive field, streaming, state, gradients, agreement
    of the implementations, and formulas against counted FLOPs, parameters and peak memory. A law that asks nothing of a
    method is listed with the reason. They are tried on each setting of the parameters, direction, position and memory
    size; of their crossings, agreement and streaming alone unless all are asked for.
    """
    registry = ctx.registry()
    chosen = registry.select(methods)
    for method in chosen:
        names = [each.name for each in method.impls]
        if impl is not None and impl not in names:
            raise unknown(f"impl of {method.name}", impl, names)
    if forms:
        _list_forms(chosen, impl, every, ctx)
        return Exit.OK
    reports = [_check(method, impl, every, ctx) for method in chosen]
    if ctx.json:
        ctx.emit([report.as_dict() for report in reports])
    return Exit.OK if all(report.ok for report in reports) else Exit.CHECK_FAILED


def _check(method: Method, impl: str | None, every: bool, ctx: Common) -> Report:
    from ctxbench.testing import check_method

    with _progress(ctx) as show:
        report = check_method(method, impl, on_finding=show, every=every)
    if not ctx.json:
        _print(report, ctx)
    return report


def _list_forms(methods: list[Method], impl: str | None, every: bool, ctx: Common) -> None:
    """One line a form and impl: how many laws are asked in which modes, or why none."""
    from ctxbench.testing.forms import coverage

    found = [line for method in methods for line in coverage(method, impl, every)]
    if ctx.json:
        ctx.emit([vars(line) for line in found])
        return
    lines = [
        [line.method, line.impl, line.form or "(defaults)", str(line.laws) if line.laws else "-",
         ", ".join(line.modes), line.reason]
        for line in found
    ]  # fmt: skip
    click.echo(table(["METHOD", "IMPL", "FORM", "LAWS", "MODES", "NOT"], lines))
    tried = sum(line.laws > 0 for line in found)
    asked = sum(line.laws for line in found)
    click.echo(f"\n{tried} of {len(found)} forms of an impl are tried here, with {asked} laws; the others say why not")


@contextlib.contextmanager
def _progress(ctx: Common) -> Iterator[Callable[[Finding], None] | None]:
    """Name the law being tried, on a terminal only."""
    console = ctx.progress_console()
    if ctx.quiet or not console.is_terminal:
        yield None
        return
    with console.status("") as status:
        yield lambda finding: status.update(Text(f"{finding.case}  {finding.law}"))


def _print(report: Report, ctx: Common) -> None:
    from rich.table import Table

    from ctxbench.testing import HELD, NOT_APPLICABLE, NOT_CLAIMED

    console = ctx.console()
    if not ctx.quiet:
        table = Table("law", "result", "case" if ctx.verbose else "cases", "note", box=None, pad_edge=False)
        for law, status, cases, note in _lines(report.findings, ctx.verbose):
            table.add_row(Text(law), Text(status, STYLE[status]), Text(cases), Text(note))
        console.print(table)
    for finding in report.failures:
        console.print(Text(f"\n{finding.law} [{finding.case}] is violated", "bold red"))
        console.print(Text(f"  {finding.message}"))
    console.print(
        f"\n{report.method}: {report.count(HELD)} held, {len(report.failures)} violated, "
        f"{report.count(NOT_CLAIMED)} not claimed, {report.count(NOT_APPLICABLE)} not applicable",
        markup=False,
    )


def _lines(findings: list[Finding], verbose: bool) -> Iterator[tuple[str, str, str, str]]:
    """One line a law and result, or with ``verbose`` one a finding."""
    if verbose:
        for finding in findings:
            yield finding.law, finding.status, finding.case, finding.message if finding.ok else "see below"
        return
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.law, finding.status), []).append(finding)
    for (law, status), group in sorted(groups.items(), key=lambda item: item[0][0]):
        notes = dict.fromkeys(finding.message for finding in group if finding.message)
        note = "see below" if not group[0].ok else next(iter(notes), "")
        more = f" (and {len(notes) - 1} more)" if group[0].ok and len(notes) > 1 else ""
        yield law, status, str(len(group)), note + more
