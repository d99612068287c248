"""The command line. Each command lives in a module of its name, imported only when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any

import click

from ctxbench import __version__
from ctxbench.errors import CtxbenchError, Exit, unknown

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMANDS = {
    "list": "List methods, impls, suites, metrics or devices.",
    "describe": "Formulas, parameters, paper and support of a method; axes of a suite.",
    "plan": "What would run, how much it costs, why the rest would not.",
    "run": "Measure a plan; write rows and a report.",
    "show": "One run, or one cell with all samples and warnings.",
    "compare": "Two runs or impls, cell by cell: faster, slower, same, unclear.",
    "forecast": "Time and memory of cells nobody measured, with intervals.",
    "advise": "Which method for a length, a memory limit and a use; why not the others.",
    "verify": "Measure random cells of a run again: do they repeat?",
    "history": "Runs of one machine in order of time: what became faster or slower, and when.",
    "merge": "Several runs, or the parts of one plan, as one run.",
    "report": "Write the HTML report of one or more runs.",
    "export": "Rows as CSV, Parquet, Markdown, LaTeX, pytest-benchmark JSON; figures.",
    "check": "Run the conformance kit on a method.",
    "reach": "Draw which inputs reach which outputs of a method.",
    "audit": "Hold what a method, a run or the source documents claim against what is seen.",
    "new": "Write the folder of a new method.",
    "doctor": "Devices, versions, noise, missing extras.",
}


class LazyGroup(click.Group):
    """A group whose help needs no command module."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = "listing" if name == "list" else name  # a module `list` would hide the builtin in this package
        command: click.Command = importlib.import_module(f"ctxbench.cli.{module}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown("command", args[0], COMMANDS, "see `ctxbench --help`")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="ctxbench")
def cli() -> None:
    """What long-context architectures cost, at which length and memory size, on this machine.

    Start with `ctxbench run`, which measures every method at 1k to 4k tokens in under two minutes and writes a report.
    Sizes: k = 1024, m = 1048576; 1k..128k doubles. Exit codes: 0 done, 1 some cells failed, 2 usage, 3 regression,
    4 conformance check failed, 5 environment unusable, 130 interrupted.
    """


def main() -> None:
    """Entry point: errors a user can cause become one message and an exit code, never a traceback."""
    code: int | None = Exit.OK
    try:
        code = cli.main(standalone_mode=False)
        if sys.stdout is not None:  # closed by who started it
            sys.stdout.flush()  # while its failure can be told
    except CtxbenchError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error))
        code = Exit.OK
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = Exit.INTERRUPTED
    except SystemExit:  # which click makes of a closed pipe, `ctxbench list | head`, with 1 for its code
        if not type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):
            raise
    except BrokenPipeError:
        _mute()
    except OSError as error:
        if error.errno not in FULL or error.filename is not None:
            raise
        click.echo(f"error: cannot write the output: {error.strerror}\n  accepted: a disk that has room", err=True)
        code = Exit.ENVIRONMENT
        _mute()
    sys.exit(int(code or 0))


def _mute() -> None:
    """Write nothing more: what is still buffered would fail once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
