"""``ctxbench advise``: a ranking, refusals, rules, and its own check."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.cell import Cell
from ctxbench.cost.figures import Evaluator
from ctxbench.cost.machine import built_in
from ctxbench.registry import discover
from ctxbench.rows import Latency, PeakBytes, row_for
from ctxbench.run.store import Store
from ctxbench.units import format_bytes

METHODS = "dense,longformer,transformer_xl"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Times and peaks that follow the formulas."""
    monkeypatch.chdir(tmp_path)
    registry, evaluator = discover(), Evaluator()
    with Store.open(Path("run")) as store:
        store.write_header({"command": "ctxbench run", "environment": {}})
        for name in METHODS.split(","):
            method = registry[name]
            plain = method.params().as_dict()
            for length in (1024, 2048, 4096, 8192, 16384):
                cell = Cell(
                    method=name, impl="blocked", seq_len=length, params=plain, position=method.positions[0],
                    memory=plain.get(method.memory_parameter or ""),
                )  # fmt: skip
                figures = evaluator.figures(method, cell)
                assert figures is not None
                time = 2e-4 + figures.flops / 1e11
                latency = Latency(median=time, low=time, high=time, samples=[[time]] * 3, n_processes=3)
                assert figures.peak_bytes is not None
                taken = int(figures.peak_bytes * (1 + 0.2 * METHODS.split(",").index(name)))
                peak = PeakBytes(allocated=taken, resident=taken)
                store.append_row(row_for(cell, "ok", latency_s=latency, peak_bytes=peak))
    return "run"


def test_a_ranking_with_reasons_forecasts_and_rules(run: str, ctxbench: Callable[..., Any]) -> None:
    asked = ("advise", "--run", run, "--seq", "100k", "--memory-limit", "16GiB", "--impls", "blocked")
    found = ctxbench(*asked, "--json").json
    assert [(c["method"], c["forecast"]) for c in found["ranked"]][-1] == ("dense", True)
    assert all(len(c["estimate"]["evidence"]) == 5 for c in found["ranked"])
    assert {rule["verdict"] for rule in found["recommendations"]} >= {"holds", "not measured"}
    shown = ctxbench(*asked).out
    for part in ("100k tokens, forward, cpu, fp32", "(forecast)", "fastest", "recommendations of the source documents"):
        assert part in shown


def test_a_stream_needs_a_state_that_stays_bounded(run: str, ctxbench: Callable[..., Any]) -> None:
    found = ctxbench("advise", "--methods", METHODS, "--seq", "64k", "--streaming", "--device", "cpu", "--json").json
    assert "transformer_xl" in {c["method"] for c in found["ranked"]}
    assert any("grows without bound" in c["refusal"] for c in found["refused"] if c["method"] == "dense")
    assert "dense" not in {c["method"] for c in found["ranked"]}


def test_a_limit_refuses_and_a_datasheet_answers(ctxbench: Callable[..., Any]) -> None:
    found = ctxbench(
        "advise", "--methods", "dense,bigbird", "--impls", "reference", "--seq", "256k", "--causal", "--device", "h200"
    ).out
    for part in ("NVIDIA H200 SXM, datasheet peaks", "no method meets this request", "does not fit", "no causal form"):
        assert part in found


def test_peak_and_needs_are_one_story(run: str, ctxbench: Callable[..., Any]) -> None:
    """What a refusal needs is the peak and what lives beside it, as the ranking shows both."""
    asked = ("advise", "--run", run, "--methods", "dense", "--impls", "blocked", "--seq", "64k", "--device", "cpu")
    (dense,) = ctxbench(*asked, "--memory-limit", "1TiB", "--json").json["ranked"]
    (refused,) = ctxbench(*asked, "--memory-limit", "100MiB", "--json").json["refused"]
    assert dense["beside_bytes"] > 400 * 2**20  # the runtime
    likely = dense["estimate"]["peak_bytes"]
    wanted = f"needs {format_bytes(likely + dense['beside_bytes'])} (peak {format_bytes(likely)}), limit 100 MiB"
    assert wanted in refused["refusal"]
    shown = ctxbench(*asked, "--memory-limit", "1TiB").out
    assert "NEEDS is held against the limit" in shown
    assert format_bytes(dense["estimate"]["peak_at_most"] + dense["beside_bytes"]) in shown


def test_a_gpu_that_is_not_here_is_answered_by_an_assumption_that_says_so(
    ctxbench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctxbench.cli.target.cuda_present", lambda: False)
    monkeypatch.setattr("ctxbench.cli.target.load_ceilings", lambda config: {"cuda": built_in("cuda", 0)})
    asked = ("advise", "--methods", "dense", "--impls", "reference", "--seq", "4k", "--device", "cuda")
    for title in (ctxbench(*asked).out, ctxbench(*asked, "--json").json["machine"]):
        assert "cuda, which is not here: 100 TFLOP/s in bf16" in title
        assert "--device a100|h100|h200 asks a datasheet" in title


def test_the_check_says_how_often_the_advice_was_right(run: str, ctxbench: Callable[..., Any]) -> None:
    shown = ctxbench("advise", "--run", run, "--check").out
    assert "advised within 10 % of the best, of held-out questions" in shown
    for part in ("of all methods, one a length", "of every two methods", "of all options with a memory limit"):
        assert part in shown
    found = ctxbench("advise", "--run", run, "--check", "--json").json
    plain, pairs, free, limited = (found["questions"][kind] for kind in found["questions"])
    assert (plain["count"], plain["within_10_percent"]) == (2, 1)
    assert (pairs["count"], pairs["within_10_percent"]) == (6, 1)
    assert free["count"] > plain["count"]
    assert limited["count"] > 0
    assert plain["at_one_speed_within_10_percent"] is None
    assert len(found["trials"]) == 2


def test_impls_for_other_devices_are_counted_and_listed_on_request(run: str, ctxbench: Callable[..., Any]) -> None:
    asked = ("advise", "--run", run, "--methods", METHODS, "--seq", "64k", "--device", "cpu", "--memory-limit", "1MiB")
    short, whole = ctxbench(*asked).out, ctxbench(*asked, "-v").out
    assert "triton runs on cuda" not in short
    assert "impls that do not run here, of methods named above:" in short
    assert "dense / triton" in whole
    alone = ctxbench(*asked, "--impls", "triton").out
    assert "triton runs on cuda" in alone  # where nothing else of the method was weighed it is the reason


def test_a_limit_that_only_a_likely_peak_meets_names_the_likeliest(run: str, ctxbench: Callable[..., Any]) -> None:
    asked = ("advise", "--run", run, "--methods", "dense", "--impls", "blocked", "--seq", "64k", "--device", "cpu")
    (dense,) = ctxbench(*asked, "--memory-limit", "1TiB", "--json").json["ranked"]
    likely, reserve = dense["estimate"]["peak_bytes"], dense["estimate"]["peak_at_most"]
    tight = ctxbench(*asked, "--memory-limit", "1MiB", "--json").json["refused"][0]["refusal"]
    assert "does not fit" in tight
    (forecast,) = ctxbench("forecast", *asked[1:], "--json").json["cells"]
    between = forecast["beside_bytes"] + (likely + reserve) // 2
    shown = ctxbench(*asked, "--memory-limit", str(between)).out
    assert "no method surely meets this request; the likeliest is dense / blocked" in shown


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "advice needs a length"),
        (["--check"], "--check needs measured lengths"),
        (["--seq", "1k,2k", "--methods", "dense"], "one --seq at a time"),
        (["--seq", "1k", "--mode", "forward,train", "--methods", "dense"], "one --mode at a time"),
        (["--seq", "1k", "--methods", "dens"], "did you mean 'dense'"),
        (["run", "--check"], "accepted: --run run"),
    ],
)
def test_bad_input_is_one_message(run: str, arguments: list[str], part: str, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("advise", *arguments)
    assert (result.code, part in result.err) == (2, True)
