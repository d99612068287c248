"""``ctxbench merge`` and ``--shard``: parts of one plan, runs of other methods or machines, cells measured twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ctxbench.cell import Cell
from ctxbench.rows import Gate, Latency, Row, row_for
from ctxbench.run.store import Store, read_rows, read_run
from ctxbench.text import Warn, kind_of

PLAN = ("run", "--methods", "dense,longformer", "--impls", "reference,blocked", "--seq", "64..256", "--device", "cpu")


@pytest.fixture
def here(instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def row(method: str = "m", seconds: float = 0.01, status: str = "ok", length: int = 1024) -> Row:
    latency = Latency(median=seconds, low=seconds, high=seconds, samples=[[seconds]] * 3, n_processes=3)
    cell = Cell(method=method, impl="i", seq_len=length)
    return row_for(cell, status, latency_s=latency if status == "ok" else None, gate=Gate(ok=True))


def write(name: str, *rows: Row, cpu: str = "Here", **header: Any) -> str:
    with Store.open(Path(name)) as store:
        for each in rows:
            store.append_row(each)
        environment = {"cpu": {"model": cpu, "cores_usable": 2}}
        store.write_header(
            {"environment": environment, "status": "finished", "sessions": [{"command": name}], **header}
        )
    return name


def test_the_parts_of_a_plan_become_the_plan(here: Path, ctxbench: Callable[..., Any]) -> None:
    for index in (1, 2, 3):
        done = ctxbench(*PLAN, "--shard", f"{index}/3", "--out", f"part{index}", "--no-report")
        assert done.code == 0, done.err
    ctxbench(*PLAN, "--out", "whole", "--no-report")
    two = ctxbench("merge", "part1", "part3", "--out", "two")
    assert "planned cells have no row: the parts here are 1/3, 3/3" in two.err
    three = ctxbench("merge", "part1", "part2", "part3", "--out", "three", "--json").json
    assert (three["missing"], three["notes"], three["rows"]) == (0, [], 12)
    assert {r.cell for r in read_rows(Path("three"))} == {r.cell for r in read_rows(Path("whole"))}
    merged, whole = read_run(Path("three")), read_run(Path("whole"))
    assert merged["comparable"] == whole["comparable"]
    assert merged["plan"]["digest"] == whole["plan"]["digest"]
    assert "--shard" not in merged["command"]
    assert len(merged["sessions"]) == len(merged["merged_from"]) == 3
    # What is missing can be measured: the plan of the whole continues there.
    assert ctxbench("run", "--out", "two", "--no-report").code == 0
    assert {r.cell for r in read_rows(Path("two"))} == {r.cell for r in read_rows(Path("whole"))}
    assert ctxbench("report", "three").code == 0


def test_a_part_is_continued_as_that_part_and_no_other(here: Path, ctxbench: Callable[..., Any]) -> None:
    ctxbench(*PLAN, "--shard", "1/3", "--out", "part", "--no-report")
    before = read_rows(Path("part"))
    assert ctxbench("run", "--out", "part", "--no-report").code == 0
    assert read_rows(Path("part")) == before
    refused = ctxbench(*PLAN, "--shard", "2/3", "--out", "part", "--no-report")
    assert refused.code == 2
    assert "shard was 1/3, now 2/3" in refused.err


def test_plan_shows_the_part(here: Path, ctxbench: Callable[..., Any]) -> None:
    shown = ctxbench("plan", *PLAN[1:], "--shard", "2/3")
    assert "part 2/3 of 12 cells" in shown.out
    assert ctxbench("plan", *PLAN[1:], "--shard", "3/2").code == 2


def test_a_measurement_goes_before_a_failure_and_a_failure_before_a_skip(here: Path, ctxbench: Any) -> None:
    a = write("a", row("x", status="skipped"), row("y", status="oom"), row("z", status="skipped"))
    b = write("b", row("x"), row("y", status="skipped"), row("z", status="timeout"))
    assert ctxbench("merge", a, b, "--out", "both").code == 0
    assert {r.method: r.status for r in read_rows(Path("both"))} == {"x": "ok", "y": "oom", "z": "timeout"}


def test_a_cell_measured_twice_needs_a_decision(here: Path, ctxbench: Any) -> None:
    a, b = write("a", row(seconds=1.0)), write("b", row(seconds=2.0), row("other"))
    refused = ctxbench("merge", a, b, "--out", "both")
    assert refused.code == 2
    for text in ("1 cells", "m/i at 1024 tokens by a and b", "--keep first", "ctxbench compare"):
        assert text in refused.err
    assert not Path("both", "rows.jsonl").exists()
    for keep, seconds in (("first", 1.0), ("last", 2.0)):
        assert ctxbench("merge", a, b, "--out", keep, "--keep", keep).code == 0
        medians = {r.method: r.latency_s.median for r in read_rows(Path(keep)) if r.latency_s}
        assert medians == {"m": seconds, "other": 0.01}


def test_rows_of_another_machine_say_so(here: Path, ctxbench: Any) -> None:
    a, b = write("a", row("x")), write("b", row("y"), row("z", status="skipped"), cpu="There")
    done = ctxbench("merge", a, b, "--out", "both")
    assert "b was measured on another machine (cpu There)" in done.err
    rows = {r.method: r for r in read_rows(Path("both"))}
    assert [kind_of(text) for text in rows["y"].warnings] == [Warn.OTHER_MACHINE]
    assert (rows["y"].env_delta["machine"]["cpu"], rows["y"].env_delta["run"]) == ("There", "b")
    assert not rows["x"].warnings
    assert not rows["z"].warnings


def test_runs_of_different_plans_are_read_and_not_continued(here: Path, ctxbench: Any) -> None:
    header = {"config": {"methods": ["x"]}, "comparable": {"methods": ["x"]}}
    a = write("a", row("x"), plan={"digest": "1", "whole": 1}, **header)
    b = write("b", row("y"), plan={"digest": "2", "whole": 1}, **header)
    assert ctxbench("merge", a, b, "--out", "both").code == 0
    assert "config" not in read_run(Path("both"))
    refused = ctxbench("run", "--methods", "dense", "--seq", "64", "--out", "both")
    assert refused.code == 2
    assert "can be read, not continued" in refused.err
    assert len(read_rows(Path("both"))) == 2


def test_what_cannot_be_merged_is_refused(here: Path, ctxbench: Any) -> None:
    a = write("a", row("x"), versions={"protocol": 1})
    old = write("old", row("y"), versions={"protocol": 0})
    assert "different protocols" in ctxbench("merge", a, old, "--out", "both").err
    assert "at least two runs" in ctxbench("merge", a, a, "--out", "both").err
    assert "not a run folder" in ctxbench("merge", a, "nowhere", "--out", "both").err
    b = write("b", row("z"), versions={"protocol": 1})
    full = ctxbench("merge", a, b, "--out", old)
    assert (full.code, "holds a run already" in full.err) == (2, True)
    assert not Path("both", "rows.jsonl").exists()
    assert json.loads(Path("a/run.json").read_bytes())["sessions"] == [{"command": "a"}]
    assert msgspec.json.decode(Path("old/run.json").read_bytes())["versions"] == {"protocol": 0}
