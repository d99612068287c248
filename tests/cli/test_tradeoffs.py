"""``ctxbench show --crossover``, ``--pareto`` and ``--frontier``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.cell import Cell
from ctxbench.rows import Latency, PeakBytes, row_for
from ctxbench.run.store import Store


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with Store.open(tmp_path / "run") as store:
        store.write_header({"command": "ctxbench run", "environment": {}})
        for length in (1024, 2048, 4096, 8192, 16384):
            for method, memory, time in (("dense", None, 1e-9 * length**2), ("longformer", 512, 3e-6 * length)):
                cell = Cell(method=method, impl="blocked", seq_len=length, memory=memory)
                latency = Latency(median=time, low=time, high=time, samples=[[time]] * 3, n_processes=3)
                peak = PeakBytes(allocated=length * 10240, resident=length * 10240)
                store.append_row(row_for(cell, "ok", latency_s=latency, peak_bytes=peak))
    return tmp_path / "run"


def test_tables_of_crossovers_front_and_frontier(run: Path, ctxbench: Callable[..., Any]) -> None:
    shown = ctxbench("show", run, "--crossover", "dense,longformer").out
    for part in ("dense / blocked", "longformer / blocked (512)", "2.9k", "100 %", "1k..16k"):
        assert part in shown
    shown = ctxbench("show", run, "--pareto", "--seq", "16k").out
    assert "time and memory at 16k tokens" in shown
    assert "by longformer / blocked (memory 512)" in shown
    assert "1.00 GiB" in ctxbench("show", run, "--frontier", "1GiB,16GiB").out


def test_json_holds_what_was_asked(run: Path, ctxbench: Callable[..., Any]) -> None:
    found = ctxbench("show", run, "--crossover", "all", "--pareto", "--frontier", "1GiB", "--json").json
    assert set(found) == {"crossovers", "pareto", "frontier"}
    assert found["crossovers"][0]["seq_len"] == pytest.approx(3000)
    assert {point["verdict"] for point in found["pareto"]} == {"front", "dominated"}
    assert all(each["by_formula"] >= each["measured"] for each in found["frontier"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--crossover", "dense"], "two or more methods"),
        (["--crossover", "dense,longf"], "did you mean 'longformer'"),
        (["--pareto", "--seq", "3k"], "lengths of this run: 1k, 2k, 4k, 8k, 16k"),
        (["--frontier", "lots"], "malformed amount of memory"),
    ],
)
def test_bad_input_is_one_message(run: Path, arguments: list[str], part: str, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("show", run, *arguments)
    assert (result.code, part in result.err) == (2, True)
