"""``ctxbench show``: a run, or one cell of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.cell import Cell
from ctxbench.rows import Flops, Forecast, Gate, Latency, PeakBytes, Picked, StateBytes, row_for
from ctxbench.run.store import Store
from ctxbench.text import Warn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    latency = Latency(
        median=0.0124, low=0.012, high=0.013, samples=[[0.0124] * 30, [0.0125]], n_processes=2, stop=["budget", "n=1"],
        contended=[False, True],
    )  # fmt: skip
    cell = Cell(method="dense", impl="blocked", seq_len=4096, params={"window": 3})
    with Store.open(tmp_path / "run") as store:
        store.write_header({"suite": "quick", "status": "finished", "command": "ctxbench run"})
        store.append_row(
            row_for(
                cell, "ok", latency_s=latency, gate=Gate(ok=True, probes={"causality": "passed"}),
                peak_bytes=PeakBytes(allocated=2**20, formula=2**20), flops=Flops(counted=123, formula=123),
                forecast=Forecast(latency_s=0.01, basis="roofline"), warnings=[Warn.CONTENDED("1 of 2")],
                picked=Picked(why="planted", passed=["slabs: left out by name", "flex: no compiler"]),
            )
        )  # fmt: skip
        failed = Cell(method="dense", impl="reference", seq_len=8192)
        store.append_row(
            row_for(failed, "error", "ValueError: planted", detail="Traceback (most recent call last)\n  here")
        )
    return tmp_path / "run"


def test_a_run_is_a_table_of_its_cells(folder: Path, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("show", folder)
    assert result.code == 0
    for part in ("suite quick", "dense / blocked", "12.4 ms", "1.00 MiB", "ValueError: planted"):
        assert part in result.out


def test_lengths_at_which_an_impl_is_unsupported_share_a_line(folder: Path, ctxbench: Callable[..., Any]) -> None:
    with Store.open(folder) as store:
        for length in (1024, 2048, 4096):
            store.append_row(row_for(Cell(method="dense", impl="flash", seq_len=length), "unsupported", "no GPU"))
        other = Cell(method="dense", impl="flash", seq_len=4096, mode="train")
        store.append_row(row_for(other, "unsupported", "no GPU at all"))
    lines = [line.split() for line in ctxbench("show", folder).out.splitlines() if "flash" in line]
    assert [line[:6] for line in lines] == [
        ["3", "cells", "dense", "/", "flash", "1k"], [other.key, "dense", "/", "flash", "4k", "-"]
    ]  # fmt: skip
    assert "6 cells; unsupported ones" in ctxbench("show", folder).out
    assert ctxbench("show", folder, "-v").out.count("/ flash") == 4


def test_a_cell_beside_a_question_about_the_run_is_refused(folder: Path, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("show", folder, "--pareto", "16k")
    assert (result.code, "--seq 16k" in result.err) == (2, True)


@pytest.mark.parametrize("name", ["dense/blocked/4k", "blocked", "4096"])
def test_a_cell_shows_samples_gate_warnings_and_forecast(name: str, folder: Path, ctxbench: Callable[..., Any]) -> None:
    out = ctxbench("show", folder, name).out
    parts = ["process 0: stopped by budget", "10 more (-v)", "process 1: stopped by n=1, contended", "window 3"]
    for part in [*parts, "causality passed", "1.00 MiB", "(123)", "roofline", "close other programs"]:
        assert part in out
    assert (
        "  picked     by auto: planted (expected, not measured); passed over slabs: left out by name; flex: no" in out
    )
    assert "8k" not in out
    assert "more (-v)" not in ctxbench("show", folder, name, "-v").out


def test_a_cell_is_found_by_the_beginning_of_its_key(folder: Path, ctxbench: Callable[..., Any]) -> None:
    key = Cell(method="dense", impl="reference", seq_len=8192).key
    found = ctxbench("show", folder, key[:6], "--json").json
    assert [row["cell"] for row in found] == [key]
    assert "Traceback" in found[0]["detail"]


def test_json_of_a_run_holds_header_and_rows(folder: Path, ctxbench: Callable[..., Any]) -> None:
    found = ctxbench("show", folder, "--json").json
    assert (found["run"]["suite"], len(found["rows"])) == ("quick", 2)


def test_an_unknown_cell_or_folder_is_a_usage_error(folder: Path, ctxbench: Callable[..., Any], tmp_path: Path) -> None:
    missing = ctxbench("show", folder, "sparse/blocked")
    assert (missing.code, "no cell 'sparse/blocked'" in missing.err) == (2, True)
    nowhere = ctxbench("show", tmp_path / "nowhere")
    assert (nowhere.code, "not a run folder" in nowhere.err) == (2, True)


def test_a_damaged_header_costs_the_header_alone(folder: Path, ctxbench: Callable[..., Any]) -> None:
    (folder / "run.json").write_text("{torn")
    result = ctxbench("show", folder)
    assert (result.code, "run.json cannot be read" in result.err, "dense / blocked" in result.out) == (0, True, True)
    (folder / "rows.jsonl").unlink()
    empty = ctxbench("show", folder)
    assert (empty.code, "continues an interrupted one" in empty.err) == (2, True)


def test_growth_with_the_length_stands_below_the_cells(tmp_path: Path, ctxbench: Callable[..., Any]) -> None:
    with Store.open(tmp_path / "run") as store:
        store.write_header({"suite": "scaling"})
        for length in (1024, 2048, 4096, 8192, 16384):
            seconds = 1e-9 * length**2
            samples = [[0.99 * seconds], [seconds], [1.01 * seconds]]
            latency = Latency(median=seconds, low=seconds, high=seconds, samples=samples, n_processes=3)
            cell = Cell(method="dense", impl="blocked", seq_len=length)
            store.append_row(row_for(cell, "ok", latency_s=latency, flops=Flops(formula=length**2)))
    out = ctxbench("show", tmp_path / "run").out
    for part in ("1k to 16k", "T^2.00 (1.9", "  T^2.00  ", "from 4k"):
        assert part in out
    assert "8k to 16k" not in out
    assert "8k to 16k" in ctxbench("show", tmp_path / "run", "-v").out
    (growth,) = ctxbench("show", tmp_path / "run", "--json").json["scaling"]
    assert growth["overall"]["value"] == pytest.approx(2)
    assert (growth["changes"], growth["tail"]["first"], len(growth["steps"])) == ([], 4096, 4)


def test_a_token_after_a_context_is_told_flat_or_linear(tmp_path: Path, ctxbench: Callable[..., Any]) -> None:
    with Store.open(tmp_path / "run") as store:
        store.write_header({"suite": "decoding", "status": "finished", "command": "ctxbench run decoding"})
        for length in (1024, 8192, 65536):
            for method, seconds, kept in (("flat", 4e-4, 2**20), ("long", 1e-7 * length, 2048 * length)):
                cell = Cell(method=method, impl="blocked", seq_len=length, mode="decode")
                samples = [[seconds] * 3, [1.01 * seconds] * 3, [0.99 * seconds] * 3]
                latency = Latency(median=seconds, low=seconds, high=seconds, samples=samples, n_processes=3)
                store.append_row(row_for(cell, "ok", latency_s=latency, state_bytes=StateBytes(measured=kept)))
    out = ctxbench("show", tmp_path / "run").out
    _, _, part = out.partition("one token after a context")
    assert "flat: T^" in part
    assert "linear: T^1.0" in part
    assert "128 MiB" in part
    found = {each["method"]: each for each in ctxbench("show", tmp_path / "run", "--json").json["carried"]}
    assert found["long"]["state_bytes"] == [2**21, 2**24, 2**27]
