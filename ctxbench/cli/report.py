"""``ctxbench report``: one self-contained HTML page from one or more runs."""

from __future__ import annotations

from pathlib import Path

import click

from ctxbench.cli.common import Common, common_options


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to write it. [RUN/report.html]")
@click.option("--title", help="Title of the page. [the names of the runs]")
@click.option("--static", is_flag=True, help="Pictures and tables, no script. [RUN/static.html]")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@common_options
def command(runs: tuple[Path, ...], out: Path | None, title: str | None, static: bool, show: bool, ctx: Common) -> None:
    """Write the HTML report of one or more RUN folders; it works from disk, offline and without JavaScript.

    Two runs are compared, the first being the baseline. Of more, or of a folder that holds runs, the trends are drawn.
    """
    from ctxbench.analysis.history import find_runs
    from ctxbench.analysis.runs import ROWS, read_runs
    from ctxbench.reports.page import write

    holding = [place for place in runs if place.is_dir() and not (place / ROWS).is_file()]
    folders = [run.folder for run in find_runs(runs)] if holding else list(runs)
    for run in read_runs(folders):
        for warning in run.warnings:
            ctx.note(f"{run.name}: {warning}")
    if holding and out is None:
        out = holding[0] / ("static.html" if static else "report.html")
    path = write(folders, out, title, ctx.registry(), static)
    if ctx.json:
        ctx.emit({"report": str(path), "bytes": path.stat().st_size})
    else:
        click.echo(path)
    if show:
        click.launch(str(path))
