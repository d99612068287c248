"""``ctxbench compare``: two runs, or two impls, cell by cell. Never imports torch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ctxbench.cli.common import Common, common_options, table
from ctxbench.errors import Exit, UserError
from ctxbench.units import counted, format_seconds, format_tokens, parse_fraction

if TYPE_CHECKING:
    from ctxbench.analysis.compare import Compared, Comparison, Side
    from ctxbench.analysis.runs import Run

SIGNS = {"faster": "-", "slower": "+", "same": "=", "unclear": "?", "invalid": "!"}  # a verdict without colour


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--fail-on", metavar="slower:5%", help="Exit with 3 when a cell is slower by at least this.")
@click.option("--normalise", is_flag=True, help="Admit different machines, in units of the reference kernels.")
@click.option("--again", is_flag=True, help="Measure the unclear cells again, with enough processes, then decide.")
@click.option("--calibrate", is_flag=True, help="A and B measured the same code: store the machine's noise floor.")
@common_options
def command(
    a: str, b: str, fail_on: str | None, normalise: bool, again: bool, calibrate: bool, ctx: Common
) -> None:  # fmt: skip
    """Compare run B with run A, cell by cell; RUN:IMPL takes one impl of a run.

    A verdict rests on process medians: faster or slower needs an exact rank test at 1 % over all cells and a ratio
    beyond the machine's noise floor, same needs an interval inside +-2 %. Everything else is unclear, and the reason
    stands beside it. `ctxbench run --processes 8` measures enough to decide; --again does that for the unclear cells of
    a run that this machine and this version of the code measured, in folders of their own.
    """
    from ctxbench.analysis.compare import compare

    threshold = _threshold(fail_on)
    left, right = _side(a), _side(b)
    for warning in dict.fromkeys((*left.run.warnings, *right.run.warnings)):
        ctx.note(warning)
    same = left.run.folder.resolve() == right.run.folder.resolve() and left.impl == right.impl
    if same and calibrate:
        raise UserError(
            "an A/A calibration needs the same code measured twice, received one run twice\n"
            "  run the command of A again and compare the new folder with it"
        )
    if same:
        ctx.note("A and B are the same rows")
    found = compare(left, right, normalise)
    if calibrate:
        _calibrate(left, right, found, ctx)
        return
    if again:
        from ctxbench.cli.remeasure import with_fresh_rows

        left, right = with_fresh_rows(left, right, found, ctx)
        found = compare(left, right, normalise)
    failing = found.regressions(threshold) if threshold else []
    _refuse_fine_gate(threshold, found, ctx)
    code = Exit.REGRESSION if failing else Exit.CELLS_FAILED if threshold and found.broken() else Exit.OK
    commands = _again(left, right, found)
    if ctx.json:
        plain: dict[str, Any] = msgspec.to_builtins(found)
        ctx.emit({**plain, "counts": found.counts(), "exit_code": int(code), "measure_again": commands})
    else:
        _print(left, right, found, commands, ctx)
        if threshold:
            _print_gate(threshold, failing, found)
    if code != Exit.OK:
        sys.exit(int(code))


def _side(text: str) -> Side:
    """``RUN`` or ``RUN:IMPL``; a folder whose name holds a colon is a folder."""
    from ctxbench.analysis.compare import Side
    from ctxbench.analysis.runs import read_run

    folder, colon, impl = text.rpartition(":")
    if colon and folder and not Path(text).exists():
        return Side(read_run(Path(folder)), impl)
    return Side(read_run(Path(text)))


def _threshold(text: str | None) -> float | None:
    if text is None:
        return None
    verdict, colon, share = text.partition(":")
    if verdict.strip() != "slower" or not colon:
        raise UserError(f"malformed --fail-on {text!r}\n  accepted: slower:SHARE, for example slower:5%")
    return parse_fraction(share)


def _refuse_fine_gate(threshold: float | None, found: Comparison, ctx: Common) -> None:
    """A gate finer than the machine's noise would pass whatever happens.

    Raises:
        UserError: the noise floor of every cell is above the gate.
    """
    if threshold is None:
        return
    floors = [cell.floor for cell in found.cells if cell.floor is not None]
    above = [floor for floor in floors if floor > threshold]
    if floors and len(above) == len(floors):
        raise UserError(
            f"--fail-on slower:{100 * threshold:g}% is tighter than the noise floor of this machine, "
            f"{100 * min(floors):.1f} % and more\n  accepted: a share above it\n"
            "  or measure on a quieter machine, with more --processes"
        )
    if above:
        ctx.note(
            f"{len(above)} of {len(found.cells)} cells have a noise floor above the gate: it is theirs that counts"
        )


def _calibrate(left: Side, right: Side, found: Comparison, ctx: Common) -> None:
    from ctxbench.analysis import noise

    devices = {cell.device for cell in found.cells}
    stored = []
    for device in sorted(devices):
        cells = [(c.a_s, c.ratio) for c in found.cells if c.device == device and c.a_s and c.ratio]
        machine = noise.identity(left.run.info, device)
        if machine != noise.identity(right.run.info, device):
            raise UserError("an A/A calibration needs two runs of one machine")
        stored.append(noise.calibrate(machine, cells, [left.name, right.name]))
    if ctx.json:
        ctx.emit([{"calibration": calibration, "file": str(path)} for calibration, path in stored])
        return
    for calibration, path in stored:
        click.echo(f"noise floor {100 * calibration.floor.overall:.1f} % over {calibration.cells} cells  {path}")


def _again(left: Side, right: Side, found: Comparison) -> list[str]:
    """Commands that measure the unclear cells again with enough processes; nothing where none is unclear."""
    from ctxbench.analysis.compare import Verdict, least_processes

    unclear = [cell for cell in found.cells if cell.verdict is Verdict.UNCLEAR]
    if not unclear:
        return []
    enough = max(8, least_processes(len(unclear)))
    axes = {
        "--methods": {cell.method for cell in unclear},
        "--impls": {impl for cell in unclear for impl in cell.impl.split(" > ")},
        "--seq": {str(cell.seq_len) for cell in unclear},
    }
    chosen = [part for flag, names in axes.items() for part in (flag, ",".join(sorted(names, key=_by_size)))]
    # Where an option is given twice, the last one counts.
    return [
        shlex.join([*_command(run), *chosen, "--processes", str(enough), "--out", f"{run.folder}-again"])
        for run in {run.folder: run for run in (left.run, right.run)}.values()
    ]


def _command(run: Run) -> list[str]:
    """The command a run was started with, as words; what is left of it where it was not `ctxbench run`."""
    first = run.info.get("command") or ""
    words = shlex.split(first) if isinstance(first, str) else [str(word) for word in first]
    return words if words[:2] == ["ctxbench", "run"] else ["ctxbench", "run"]


def _by_size(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (0, name)


def _print(left: Side, right: Side, found: Comparison, again: list[str], ctx: Common) -> None:
    click.echo(f"A  {left.name}\nB  {right.name}\nratios are B over A: above 1, B is slower")
    for note in found.notes:
        click.echo(f"note: {note}")
    # What neither run had the time or the hardware for is no news about either.
    shown = [cell for cell in found.cells if ctx.verbose or not _idle(cell)]
    if shown:
        click.echo(table(HEADERS, [_line(cell, ctx.verbose) for cell in shown]))
    if len(shown) < len(found.cells):
        click.echo(f"skipped or unsupported in both: {counted(len(found.cells) - len(shown), 'cell')} (-v lists them)")
    if any(cell.adjusted is not None for cell in found.cells) and not ctx.quiet:
        click.echo("~ less what the reference beside the samples says of the machine; A and B are as measured")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in found.counts().items())
    click.echo(f"{counted(len(found.cells), 'cell')}: {counts}")
    for name, cells in (("A", found.only_a), ("B", found.only_b)):
        if cells:
            click.echo(f"only in {name}: {counted(len(cells), 'cell')}")
    if again and not ctx.quiet:
        click.echo("to decide the unclear cells, measure them again, then compare the new folders:")
        for line in again:
            click.echo(f"  {line}")


def _idle(cell: Compared) -> bool:
    """Whether neither run so much as tried this cell."""
    return {cell.status_a, cell.status_b} <= {"skipped", "unsupported"}


HEADERS = ["", "METHOD / IMPL", "LENGTH", "MEMORY", "MODE", "A", "B", "RATIO", "INTERVAL", "N", "P", "VERDICT", "WHY"]


def _line(cell: Compared, verbose: bool) -> list[str]:
    ratio = "-" if cell.ratio is None else f"{cell.ratio:.3f}"
    interval = "-"
    if cell.low is not None and cell.high is not None and cell.confidence is not None:
        interval = f"{cell.low:.3f} to {cell.high:.3f}" + (
            "" if cell.confidence >= 0.95 else f" ({cell.confidence:.0%})"
        )
    reason = cell.reason if verbose or len(cell.reason) <= 90 else cell.reason[:87] + "..."
    return [
        SIGNS[cell.verdict],
        f"{cell.method} / {cell.impl}",
        format_tokens(cell.seq_len),
        format_tokens(cell.memory),
        cell.mode,
        format_seconds(cell.a_s),
        format_seconds(cell.b_s),
        ratio + (" *" if cell.normalised else " ~" if cell.adjusted is not None else ""),
        interval,
        f"{cell.n_a}, {cell.n_b}",
        "-" if cell.p_holm is None else f"{cell.p_holm:.2g}",
        str(cell.verdict),
        reason,
    ]


def _print_gate(threshold: float, failing: list[Compared], found: Comparison) -> None:
    share = f"{100 * threshold:g} %"
    if failing:
        names = ", ".join(f"{c.method}/{c.impl}/{format_tokens(c.seq_len)} x{c.ratio:.3f}" for c in failing)
        are = f"{counted(len(failing), 'cell')} {'is' if len(failing) == 1 else 'are'}"
        click.echo(f"FAILED: {are} slower by at least {share}: {names}")
    elif found.broken():
        click.echo(f"FAILED: {counted(len(found.broken()), 'cell')} that A measured failed in B")
    else:
        click.echo(f"passed: no cell is shown to be slower by at least {share}")
