"""How far a run is: a live line on a terminal, plain lines elsewhere, nothing when quiet. All of it on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctxbench.cell import Cell
from ctxbench.rows import FAILURES, Row
from ctxbench.units import format_bytes, format_seconds, format_tokens

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"ok": "green", "unstable": "yellow", "unsupported": "dim", "skipped": "dim"}


class Progress:
    """Says nothing; the base of the others."""

    def start(self, total: int, done: int) -> None:
        """A session begins with ``done`` of ``total`` cells settled."""

    def current(self, cell: Cell, what: str, left_s: float) -> None:
        """A child of this cell starts; about ``left_s`` seconds of predicted work are left."""

    def finished(self, row: Row) -> None:
        """A cell has got its row."""

    def stop(self) -> None:
        """The session has ended."""


class Plain(Progress):
    """One line a finished cell: for logs and pipes."""

    def __init__(self, console: Console):
        self.console = console
        self.total = self.done = 0
        self.left_s: float | None = None

    def start(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        if done:
            self._print(f"{done} of {total} cells are already measured")

    def current(self, _cell: Cell, _what: str, left_s: float) -> None:
        self.left_s = left_s

    def finished(self, row: Row) -> None:
        self.done += 1
        if row.status not in ("unsupported", "skipped"):
            self._print(f"{self.done:>4}/{self.total}  {describe(row)}{self._eta()}")

    def _eta(self) -> str:
        seconds = round(self.left_s or 0) if self.done < self.total else 0
        return f"  about {format_seconds(seconds)} left" if seconds else ""

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class Live(Plain):
    """A line that moves: done, total, current cell, time left; finished cells scroll above it."""

    def __init__(self, console: Console):
        super().__init__(console)
        self.bar: Any = None
        self.task: Any = None

    def start(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        super().start(total, done)
        self.bar = Bar(
            MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False), console=self.console, transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task("starting the measuring processes", total=total, completed=done)
        self.bar.start()

    def current(self, cell: Cell, what: str, left_s: float) -> None:
        super().current(cell, what, left_s)
        description = f"{cell.label()}  {format_tokens(cell.seq_len)}  {what}{self._eta()}"
        self.bar.update(self.task, description=description)

    def finished(self, row: Row) -> None:
        self.done += 1
        if row.status not in ("unsupported", "skipped"):
            style = STYLES.get(row.status, "red")
            self.bar.console.print(f"{self.done:>4}/{self.total}  {describe(row)}", style=style, markup=False)
        self.bar.update(self.task, completed=self.done)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def describe(row: Row) -> str:
    """One line about a row: ``dense / blocked  4k  fp32  forward  12.4 ms +-1.3 %  peak 212 MiB``."""
    memory = "" if row.memory is None else f"  memory {format_tokens(row.memory)}"
    head = f"{row.method} / {row.impl}  {format_tokens(row.seq_len)}{memory}  {row.dtype}  {row.mode}"
    reason = row.reason.splitlines()[0] if row.reason else ""
    if row.latency_s is None:
        return f"{head}  {row.status}: {reason}" if reason else f"{head}  {row.status}"
    latency = row.latency_s
    spread = (
        "n=1"
        if sum(map(len, latency.samples)) == 1
        else f"+-{50 * (latency.high - latency.low) / latency.median:.1f} %"
    )
    peak = row.peak_bytes.allocated if row.peak_bytes else None
    seen = "" if peak is None else f"  peak {format_bytes(peak)}"
    mark = f"  ({row.status}: {reason})" if row.status in (*FAILURES, "unstable") else ""
    return f"{head}  {format_seconds(latency.median)} {spread}{seen}{mark}"


def reporter(console: Console, quiet: bool) -> Progress:
    """What suits the terminal."""
    if quiet:
        return Progress()
    return Live(console) if console.is_terminal else Plain(console)
