"""``ctxbench plan``: what would run, and why the rest would not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DENSE = ("--methods", "dense", "--impls", "blocked", "--device", "cpu")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # never calibrated


def test_json_has_one_object_a_cell_with_its_forecast(ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("plan", *DENSE, "--seq", "1k..4k", "--json")
    assert result.code == 0
    assert [cell["seq_len"] for cell in result.json["cells"]] == [1024, 2048, 4096]
    assert all(cell["status"] == "planned" and cell["forecast"]["latency_s"] > 0 for cell in result.json["cells"])
    assert (result.json["suite"], result.json["seq_len"]) == ("scaling", [1024, 2048, 4096])
    assert result.json["counts"] == {"planned": 3}


def test_text_has_a_line_a_cell_the_total_and_the_resolved_lengths(ctxbench: Callable[..., Any]) -> None:
    out = ctxbench("plan", *DENSE, "--seq", "1k..4k").out
    assert out.count("dense / blocked") == 3
    assert "3 of 3 cells in about" in out
    assert "lengths 1k, 2k, 4k" in out
    assert "uncalibrated" in out


def test_reasons_are_counted_and_listed_on_request(ctxbench: Callable[..., Any]) -> None:
    arguments = ("plan", *DENSE, "--seq", "1k,64m", "--budget", "1h", "--memory-limit", "1GiB")
    brief, full = ctxbench(*arguments).out, ctxbench(*arguments, "-v").out
    assert "1 skipped: forecast above the memory limit" in brief
    assert "64m" not in brief.partition("\n\n")[0]
    assert "above the memory limit of 1.00 GiB" in full


def test_a_bare_plan_is_the_quick_suite(ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("plan", "--json")
    assert (result.json["suite"], result.json["seq_len"]) == ("quick", [1024, 2048, 4096])
    assert {"dense"} <= {cell["method"] for cell in result.json["cells"]}


def test_flags_reach_every_axis(ctxbench: Callable[..., Any]) -> None:
    flags = (
        "--mode", "train", "--dtype", "bf16", "--batch", "2", "--d-model", "64", "--heads", "2", "--layers", "3",
        "--d-ff", "0", "--bidirectional", "--position", "none", "--threads", "1", "--axis", "seq=512",
    )  # fmt: skip
    (cell,) = ctxbench("plan", *DENSE, *flags, "--json").json["cells"]
    wanted = {
        "mode": "train", "dtype": "bf16", "batch_size": 2, "d_model": 64, "num_heads": 2, "num_layers": 3, "d_ff": 0,
        "causal": False, "position": "none", "threads": 1, "seq_len": 512,
    }  # fmt: skip
    assert {name: cell[name] for name in wanted} == wanted


def test_a_suite_file_is_a_suite(ctxbench: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        '[axes]\nmethods = "dense"\nimpls = "blocked"\nseq_len = 256\nbatch_size = [1, 4]\n'
    )
    result = ctxbench("plan", "mine.toml", "--json")
    assert [(cell["batch_size"], cell["seq_len"]) for cell in result.json["cells"]] == [(1, 256), (4, 256)]


def test_print_config_shows_where_values_come_from(ctxbench: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.ctxbench.protocol]\nprocesses = 7\n")
    shown = ctxbench("plan", "scaling", "--seq", "2k", "--print-config", "--json").json
    assert shown["axes.seq_len"] == {"value": "2k", "origin": "flag"}
    assert shown["protocol.processes"] == {"value": 7, "origin": "pyproject.toml"}
    assert shown["protocol.sample_budget"]["origin"] == "suite scaling"
    assert shown["axes.d_model"] == {"value": 256, "origin": "default"}
    assert "# pyproject.toml" in ctxbench("plan", "--print-config").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "dens"), "did you mean 'dense'"),
        (("--impls", "blockd"), "did you mean 'blocked'"),
        (("scalign",), "did you mean 'scaling'"),
        (("--device", "gpu"), "unknown device"),
        (("--seq", "1k.."), "malformed size"),
        (("--seq", "0"), "must be at least 1"),
        (("--seq", "8k..1k"), "runs backwards"),
        (("--seq", "1q"), "malformed size '1q'"),
        (("--budget", "soon"), "malformed duration"),
        (("--memory-limit", "lots"), "malformed amount of memory"),
        (("--params", "window"), "malformed --params"),
        (("--params", "dense.window=1"), "unknown parameter of dense"),
        (("--axis", "widow=1"), "unknown axis or parameter"),
        (("--no-such-flag",), "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_input_is_a_usage_error(arguments: tuple[str, ...], said: str, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("plan", *arguments)
    assert result.code == 2
    assert said in result.err
    assert result.out == ""


def test_a_suite_with_a_wrong_key_names_it(ctxbench: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[axes]\nbtach = 1\n")
    result = ctxbench("plan", "mine.toml")
    assert result.code == 2
    assert "unknown field `btach`" in result.err
    assert "batch_size" in result.err


def test_what_auto_picks_depends_on_the_dtype_and_is_told_with_its_reason(ctxbench: Callable[..., Any]) -> None:
    arguments = (
        "plan",
        "--methods",
        "rmt,longformer",
        "--seq",
        "1k",
        "--device",
        "cpu",
        "--dtype",
        "fp32,bf16",
        "--json",
    )
    cells = ctxbench(*arguments, "--impls", "auto").json["cells"]
    assert {(cell["method"], cell["dtype"], cell["impl"]) for cell in cells} == {
        ("rmt", "fp32", "native"), ("rmt", "bf16", "native"),
        ("longformer", "fp32", "native"), ("longformer", "bf16", "native"),
    }  # fmt: skip
    without = ctxbench(*arguments, "--impls", "auto,-native").json["cells"]
    assert {(cell["method"], cell["dtype"], cell["impl"]) for cell in without} == {
        ("rmt", "fp32", "blocked"), ("rmt", "bf16", "slabs"),
        ("longformer", "fp32", "blocked"), ("longformer", "bf16", "blocked"),
    }  # fmt: skip
    (left,) = [cell["picked"] for cell in without if (cell["method"], cell["dtype"]) == ("rmt", "fp32")]
    assert left == {
        "asked": "auto", "why": "the portable fast path", "measured": False, "passed": ["native: left out by name"],
    }  # fmt: skip
    told = ctxbench(*arguments[:-1], "--impls", "auto").out
    assert (
        "   4 auto: native: kernels of our own whose scores never leave the innermost cache [longformer, rmt]" in told
    )
    told = ctxbench(*arguments[:-1], "--impls", "auto,-native").out
    assert (
        "   1 auto: slabs: plain products use bf16 units that the fused kernel leaves idle; passed over native" in told
    )
