"""``ctxbench forecast``: from a run, from a device alone, and checked against what it held out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.cell import Cell
from ctxbench.cost.figures import Evaluator
from ctxbench.registry import discover
from ctxbench.rows import Latency, PeakBytes, row_for
from ctxbench.run.store import Store

LENGTHS = tuple(1024 * 2**octave for octave in range(5))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Times that follow the formulas of two methods, with a constant."""
    monkeypatch.chdir(tmp_path)
    registry, evaluator = discover(), Evaluator()
    with Store.open(Path("run")) as store:
        store.write_header({"command": "ctxbench run", "environment": {}})
        for name in ("dense", "longformer"):
            method = registry[name]
            plain = method.params().as_dict()
            memory = plain.get(method.memory_parameter or "")
            for length in LENGTHS:
                cell = Cell(method=name, impl="blocked", seq_len=length, params=plain, memory=memory)
                figures = evaluator.figures(method, cell)
                assert figures is not None
                time = 2e-4 + figures.flops / 1e11
                latency = Latency(median=time, low=time, high=time, samples=[[time]] * 3, n_processes=3)
                peak = PeakBytes(allocated=figures.peak_bytes, resident=figures.peak_bytes, formula=figures.peak_bytes)
                store.append_row(row_for(cell, "ok", latency_s=latency, peak_bytes=peak))
    return "run"


def test_a_run_forecasts_its_own_methods(run: str, ctxbench: Callable[..., Any]) -> None:
    found = ctxbench("forecast", "--run", run, "--seq", "16k,64k", "--impls", "blocked", "--json").json
    assert {(c["method"], c["seq_len"], c["source"]) for c in found["cells"]} == {
        ("dense", 16384, "measured"), ("dense", 65536, "fit"),
        ("longformer", 16384, "measured"), ("longformer", 65536, "fit"),
    }  # fmt: skip
    assert all(c["low"] <= c["latency_s"] <= c["high"] for c in found["cells"])
    shown = ctxbench("forecast", "--run", run, "--seq", "64k", "--impls", "blocked").out
    for part in ("dense / blocked", "64k", "own cost terms fitted to 5 lengths 1k..16k", "POWER LAW"):
        assert part in shown


def test_without_a_run_the_roofline_answers_and_says_so(ctxbench: Callable[..., Any]) -> None:
    found = ctxbench(
        "forecast", "--methods", "dense", "--impls", "reference", "--seq", "64k,1m", "--device", "h200", "--json"
    ).json
    assert found["machine"] == "NVIDIA H200 SXM, datasheet peaks"
    assert [c["source"] for c in found["cells"]] == ["roofline", "roofline"]
    assert [c["memory_verdict"] for c in found["cells"]] == ["fits", "does not fit"]
    here = ctxbench("forecast", "--methods", "dense", "--seq", "4k", "--device", "cpu").out
    assert "built-in ceilings" in here
    assert "as_written" not in here


def test_the_check_prints_error_coverage_and_the_power_law(run: str, ctxbench: Callable[..., Any]) -> None:
    shown = ctxbench("forecast", "--run", run, "--check").out
    assert "2 cells held out: median error 0." in shown
    assert "100 % inside their intervals" in shown
    assert "0 of 2 peaks above" in shown
    assert len(ctxbench("forecast", "--run", run, "--check", "2", "--json").json["cells"]) == 4


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "b300"], "unknown device 'b300'"),
        (["--device", "cpu,cuda"], "unknown device"),
        (["--check"], "--check needs measured lengths"),
        (["--run", "nowhere"], "not a run folder"),
        (["--seq", "4q"], "malformed size"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], part: str, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("forecast", *arguments)
    assert result.code == 2
    assert part in result.err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--check", "run"], "accepted: --run run --check"), (["run", "--check"], "accepted: --run run")],
)
def test_a_run_in_the_wrong_place_is_told_the_right_one(
    run: str, arguments: list[str], part: str, ctxbench: Callable[..., Any]
) -> None:
    result = ctxbench("forecast", *arguments)
    assert (result.code, part in result.err) == (2, True)


def test_a_check_of_too_short_a_run_says_what_it_takes(run: str, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("forecast", "--run", run, "--check", "3")
    assert (result.code, "nothing can be held out" in result.err) == (2, True)
