"""Options every command takes, and how a command talks: data on stdout, progress and notes on stderr."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ctxbench.registry import Registry


@dataclass(frozen=True)
class Common:
    """Values of the common options."""

    plugins: tuple[str, ...] = ()
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: str = "auto"

    def registry(self) -> Registry:
        """All methods, plug-ins included; says on stderr which plug-ins could not be loaded."""
        from ctxbench.registry import discover

        found = discover(self.plugins)
        for broken in found.broken:
            self.note(f"plug-in {broken.name!r} ({broken.origin}) could not be loaded and is skipped: {broken.error}")
        return found

    def note(self, message: str) -> None:
        """A warning on stderr; silent under --quiet."""
        if not self.quiet:
            click.echo(f"warning: {message}", err=True)

    def console(self) -> Console:
        """Rich console on stdout."""
        return self._console(stderr=False)

    def progress_console(self) -> Console:
        """Rich console on stderr."""
        return self._console(stderr=True)

    def _console(self, stderr: bool) -> Console:
        from rich.console import Console

        never = self.color == "never" or (self.color == "auto" and bool(os.environ.get("NO_COLOR")))
        always = self.color == "always" or (self.color == "auto" and bool(os.environ.get("FORCE_COLOR")))
        width = None if (stderr or os.isatty(1)) else 200
        return Console(
            stderr=stderr, no_color=never, force_terminal=True if always else None, highlight=False, width=width
        )

    def emit(self, value: Any) -> None:
        """Print a value as JSON on stdout."""
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the common options to a command; the function receives them as one keyword, ``ctx: Common``."""

    @click.option(
        "--plugin",
        "plugins",
        multiple=True,
        metavar="PATH",
        help="Also load a folder, a file or a module (repeatable).",
    )
    @click.option("--json", "json_", is_flag=True, help="Print JSON on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress, no notes.")
    @click.option("-v", "--verbose", is_flag=True, help="More detail.")
    @click.option(
        "--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="auto honours NO_COLOR."
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any, plugins: tuple[str, ...], json_: bool, quiet: bool, verbose: bool, color: str, **kwargs: Any
    ) -> Any:
        return function(*args, ctx=Common(plugins, json_, quiet, verbose, color), **kwargs)

    return wrapper


def complete_methods(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion of comma-separated method names."""
    from ctxbench.registry import discover

    done, comma, rest = incomplete.rpartition(",")
    names = [*discover().names(), "all"]
    return [f"{done}{comma}{name}" for name in names if name.startswith(rest)]


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Plain aligned columns: for listings, which must not wait for a table library."""
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    lines = [headers, *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
