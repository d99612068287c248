"""``ctxbench export``: a run in other formats."""

from __future__ import annotations

from pathlib import Path

import click

from ctxbench.cli.common import Common, common_options
from ctxbench.errors import UserError

KINDS = ("csv", "parquet", "md", "latex", "pytest-benchmark", "figures")


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--to", "kind", type=click.Choice(KINDS), required=True, help="Format.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, allow_dash=True),
    help="File, folder for figures, or - for standard output. [RUN/rows.*, RUN/figures]",
)
@common_options
def command(run: Path, kind: str, out: Path | None, ctx: Common) -> None:
    """Write the rows of a RUN folder as a table or as pytest-benchmark JSON, or its figures as SVG, PDF and PNG."""
    from ctxbench.analysis.runs import read_run
    from ctxbench.reports.export import export, text

    source = read_run(run)
    for warning in source.warnings:
        ctx.note(warning)
    if str(out) == "-":
        if kind in ("parquet", "figures"):
            raise UserError(f"--to {kind} cannot be written to standard output\n  choose a place with --out PATH")
        click.echo(text(source, kind), nl=False)
        return
    paths = export(run, kind, out)
    if ctx.json:
        ctx.emit({"files": [str(path) for path in paths]})
    else:
        click.echo("\n".join(str(path) for path in (paths if kind != "figures" else paths[:1] and [paths[0].parent])))
