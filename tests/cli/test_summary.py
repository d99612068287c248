"""The table at the end of a run."""

from __future__ import annotations

import io

from rich.console import Console

from ctxbench.cell import Cell
from ctxbench.cli.summary import print_summary
from ctxbench.registry import discover
from ctxbench.rows import Latency, row_for


def test_a_sketch_with_defects_is_never_the_fastest_impl():
    def row(impl: str, seconds: float):
        latency = Latency(median=seconds, low=seconds, high=seconds, samples=[[seconds]], n_processes=1)
        return row_for(Cell(method="longformer", impl=impl, seq_len=1024), "ok", latency_s=latency)

    out = io.StringIO()
    print_summary([row("as_written", 0.001), row("blocked", 0.5)], discover(), Console(file=out, width=120))
    assert "blocked" in out.getvalue()
    assert "500 ms" in out.getvalue()
    assert "as_written" not in out.getvalue()


def test_where_nothing_was_measured_the_reasons_are_there():
    rows = [
        row_for(Cell(method="dense", impl="native", seq_len=length), "unsupported", reason="needs a C++ compiler")
        for length in (1024, 2048)
    ]
    out = io.StringIO()
    print_summary(rows, discover(), Console(file=out, width=120))
    assert "2 x unsupported: dense / native: needs a C++ compiler" in out.getvalue()
