"""Progress goes to one console: plain lines in a pipe, a moving line on a terminal, nothing when quiet."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from ctxbench.cell import Cell
from ctxbench.rows import Latency, PeakBytes, row_for
from ctxbench.run.progress import Live, Plain, Progress, describe, reporter
from ctxbench.text import Warn, explain, kind_of

CELL = Cell(method="dense", impl="blocked", seq_len=4096)


def measured(**changes: Any) -> Any:
    latency = Latency(median=0.0124, low=0.0122, high=0.0126, samples=[[0.0124, 0.0125]], n_processes=1)
    return row_for(CELL, "ok", latency_s=latency, peak_bytes=PeakBytes(allocated=212 * 2**20), **changes)


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False, legacy_windows=False)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (measured(), "dense / blocked  4k  fp32  forward  12.4 ms +-1.6 %  peak 212 MiB"),
        (row_for(CELL, "oom", "no [memory]"), "dense / blocked  4k  fp32  forward  oom: no [memory]"),
        (row_for(CELL, "error", "why\n  and more"), "dense / blocked  4k  fp32  forward  error: why"),
    ],
    ids=["ok", "oom", "two lines"],
)
def test_a_row_is_one_line(row: Any, line: str) -> None:
    assert describe(row) == line


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_finished_cells_are_shown_and_markup_in_reasons_is_not_interpreted(terminal: bool) -> None:
    screen = console(terminal)
    progress = reporter(screen, quiet=False)
    assert type(progress) is (Live if terminal else Plain)
    progress.start(total=3, done=1)
    progress.current(CELL, "process 2", 75.0)
    progress.finished(measured())
    progress.finished(row_for(CELL, "error", "[red]x[/red] planted"))
    progress.stop()
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "2/3" in shown
    assert "12.4 ms" in shown
    assert "[red]x[/red] planted" in shown


def test_the_last_cell_promises_no_more_time() -> None:
    screen = console(terminal=False)
    progress = Plain(screen)
    progress.start(total=2, done=0)
    for _ in range(2):
        progress.current(CELL, "first process", 9.0)
        progress.finished(measured())
    first, last = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert ("left" in first, "left" in last) == (True, False)


def test_plain_lines_say_what_was_done_before_and_how_long_it_will_take() -> None:
    screen = console(terminal=False)
    progress = Plain(screen)
    progress.start(total=4, done=2)
    progress.current(CELL, "first process", 370.0)
    progress.finished(measured())
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 4 cells are already measured" in shown
    assert "about 6m10s left" in shown
    assert "\x1b" not in shown


def test_skips_scroll_nothing_and_quiet_says_nothing() -> None:
    screen = console(terminal=False)
    progress = Plain(screen)
    progress.start(total=2, done=0)
    progress.finished(row_for(CELL, "skipped", "the budget is spent"))
    assert screen.file.getvalue() == ""  # type: ignore[attr-defined]
    quiet = reporter(console(terminal=True), quiet=True)
    assert type(quiet) is Progress
    quiet.start(1, 0)
    quiet.current(CELL, "x", 1.0)
    quiet.finished(measured())
    quiet.stop()


def test_every_warning_has_a_code_a_meaning_and_a_next_action() -> None:
    assert len({kind.code for kind in Warn}) == len(Warn)
    for kind in Warn:
        assert kind_of(kind("detail")) is kind
        assert kind.meaning
        assert kind.action
        assert explain(kind("2 of 3")) == f"{kind.meaning} (2 of 3); {kind.action}"


def test_a_warning_of_unknown_kind_is_shown_as_it_is() -> None:
    assert explain("something a plug-in said") == "something a plug-in said"
