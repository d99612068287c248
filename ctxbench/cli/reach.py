"""``ctxbench reach``: which input positions can influence which outputs of a method, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxbench.cli.common import Common, common_options, complete_methods
from ctxbench.errors import Exit, UserError
from ctxbench.units import counted

if TYPE_CHECKING:
    from ctxbench.analysis.reach import ReachMap
    from ctxbench.method import Method

BLOCKS = {(0, 0): " ", (1, 0): "\u2580", (0, 1): "\u2584", (1, 1): "\u2588"}


@click.command()
@click.argument("methods", required=False, metavar="[METHOD|all]", shell_complete=complete_methods)
@click.option("--run", "folder", type=click.Path(path_type=Path), help="Store the maps of its methods in this run.")
@click.option("--length", type=click.IntRange(8, 512), default=64, show_default=True, help="Tokens of a map.")
@click.option("--fresh", is_flag=True, help="With --run: draw again what the run already has.")
@common_options
def command(methods: str | None, folder: Path | None, length: int, fresh: bool, ctx: Common) -> Exit:
    """Draw which inputs reach which outputs of a METHOD, from gradients and changed values in float64.

    The parameters are scaled down so that windows, global tokens, memories and recurrence show at a small length. With
    --run the maps are kept in the run folder, and `ctxbench report` shows them on the cards of the methods.
    """
    if methods is None and folder is None:
        raise UserError("nothing to draw\n  accepted: METHOD, all, or --run RUN for the methods of a run")
    from ctxbench.analysis import reach
    from ctxbench.analysis.runs import read_run

    registry = ctx.registry()
    known: dict[str, ReachMap] = {}
    if folder is not None:
        run = read_run(folder)
        known = {} if fresh else reach.read(folder)
        names = {row.method for row in run.rows} & registry.entries.keys()
        chosen = [registry[name] for name in sorted(names)]
        if methods is not None:
            chosen = [method for method in registry.select(methods) if method.name in names]
    else:
        chosen = registry.select(methods or "all")
    failed = []
    for method in chosen:
        if method.name in known and known[method.name].seq_len == length:
            continue
        drawn = _draw(method, length)
        if isinstance(drawn, str):
            failed.append(f"{method.name}: {drawn}")
        else:
            known[method.name] = drawn
    shown = [known[method.name] for method in chosen if method.name in known]
    if folder is not None:
        reach.write(folder, known.values())
    _emit(shown, failed, folder, ctx)
    return Exit.OK if shown or not failed else Exit.CELLS_FAILED


def _draw(method: Method, length: int) -> ReachMap | str:
    from ctxbench.registry import time_limit
    from ctxbench.testing.reach import reach_map

    try:
        with time_limit(120, f"the map of {method.name}"):
            return reach_map(method, length=length)
    except Exception as error:  # a plug-in may raise anything
        return f"{type(error).__name__}: {error}"


def _emit(shown: list[ReachMap], failed: list[str], folder: Path | None, ctx: Common) -> None:
    import msgspec

    for line in failed:
        ctx.note(line)
    if ctx.json:
        ctx.emit({"maps": msgspec.to_builtins(shown), "failed": failed})
    elif folder is not None:
        click.echo(f"{counted(len(shown), 'map')} in {folder / 'reach.json'}")
    else:
        click.echo("\n\n".join(_text(each) for each in shown))


def _text(each: ReachMap) -> str:
    """The map in half blocks, two outputs a line; inputs run to the right."""
    sizes = ", ".join(f"{name} = {value}" for name, value in each.params.items())
    lines = [f"{each.method} / {each.impl}, {each.seq_len} tokens" + (f" ({sizes})" if sizes else "")]
    connected: list[Any] = [[each.state(i, j) not in ("", "claimed") for j in range(each.seq_len)]
                            for i in range(each.seq_len)]  # fmt: skip
    empty = [False] * each.seq_len
    for i in range(0, each.seq_len, 2):
        below = connected[i + 1] if i + 1 < each.seq_len else empty
        lines.append("".join(BLOCKS[int(a), int(b)] for a, b in zip(connected[i], below, strict=True)).rstrip())
    counts = each.counts()
    words = {"values": "passing values without a gradient", "claimed": "named by METHOD.reach but not seen",
             "unclaimed": "seen but not named by METHOD.reach"}  # fmt: skip
    lines += [f"{counted(counts[name], 'pair')} {text}" for name, text in words.items() if counts[name]]
    return "\n".join(lines)
