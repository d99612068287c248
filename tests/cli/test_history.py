"""``ctxbench history``: runs of one machine in order of time; a step is what a comparison decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctxbench.cell import Cell
from ctxbench.cli.history import bars
from ctxbench.rows import Gate, Latency, Row, row_for
from ctxbench.run.store import Store


def row(seconds: float, length: int, status: str = "ok", **changes: Any) -> Row:
    medians = [seconds * (1 + 0.0004 * index) for index in range(10)]
    latency = Latency(
        median=medians[0], low=medians[0], high=medians[-1], samples=[[value] * 3 for value in medians], n_processes=10
    )
    cell = Cell(method="dense", impl="blocked", seq_len=length)
    return row_for(cell, status, latency_s=latency if status == "ok" else None, gate=Gate(ok=True), **changes)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name: str, day: int, factor: float, cpu: str = "Here", **changes: Any) -> str:
        with Store.open(Path("runs") / name) as store:
            for length in (1024, 2048, 4096):
                store.append_row(row(factor * 1e-6 * length, length, **changes))
            environment = {"cpu": {"model": cpu, "cores_usable": 2}, "git": {"commit": f"{day:040d}"}}
            store.write_header(
                {
                    "created_at": f"2026-11-{day:02d}T00:00:00Z",
                    "environment": environment,
                    "versions": {"ctxbench": "1"},
                }
            )
        return f"runs/{name}"

    return run


def test_a_step_is_found_at_the_run_that_made_it(write: Any, ctxbench: Any) -> None:
    for name, day, factor in (("c", 3, 1.5), ("a", 1, 1.0), ("d", 4, 1.5), ("b", 2, 1.0)):
        write(name, day, factor)
    (history,) = ctxbench("history", "--json").json
    assert history["runs"] == ["a", "b", "c", "d"]
    (first, _, _) = history["trends"]
    assert [moment["step"] for moment in first["moments"]] == ["", "same", "slower", "same"]
    assert (first["verdict"], first["ratio"]) == ("slower", pytest.approx(1.5, rel=1e-3))
    shown = ctxbench("history").out
    for part in ("4 runs: a, b, c, d", "▁▁██", "slower x1.50 at c", "cpu Here"):
        assert part in shown


def test_a_faster_machine_is_not_a_faster_method(write: Any, ctxbench: Any) -> None:
    write("a", 1, 1.0), write("b", 2, 0.5, cpu="There"), write("c", 3, 1.0)
    (history,) = ctxbench("history", "runs", "--json").json
    assert (history["runs"], history["machine"]["cpu"]) == (["a", "c"], "Here")
    assert {trend["verdict"] for trend in history["trends"]} == {"same"}
    assert "no cell changed" in ctxbench("history", "--changed").out


def test_rows_of_another_machine_in_a_merged_run_are_left_out(write: Any, ctxbench: Any) -> None:
    write("a", 1, 1.0), write("b", 2, 1.0), write("c", 3, 9.0, env_delta={"machine": {"cpu": "There"}})
    (history,) = ctxbench("history", "--json").json
    assert {len(trend["moments"]) for trend in history["trends"]} == {2}


def test_a_slower_minute_of_the_machine_is_no_change_and_the_raw_ratio_stands_beside(write: Any, ctxbench: Any) -> None:
    speeds = (1.0, 1.04, 0.98, 1.02)  # of one run's processes: calls follow the reference

    def restless(name: str, day: int, slower: float) -> None:
        with Store.open(Path("runs") / name) as store:
            for length in (1024, 2048, 4096):
                found = row(1.0, length)
                assert found.latency_s is not None
                medians = [1e-6 * length * slower * speed for speed in speeds[: 2 + length // 2048]]
                found.latency_s.samples = [[median] * 3 for median in medians]
                found.latency_s.median, found.latency_s.n_processes = sorted(medians)[1], len(medians)
                beats = [[[taken, 1e-3 * slower * speed] for taken in range(4)] for speed in speeds]
                found.env_delta = {"processes": [{"reference_beside_s": beat} for beat in beats[: len(medians)]]}
                store.append_row(found)
            environment = {"cpu": {"model": "Here", "cores_usable": 2}}
            store.write_header({"created_at": f"2026-11-{day:02d}T00:00:00Z", "environment": environment})

    restless("a", 1, 1.0), restless("b", 2, 1.3), restless("c", 3, 1.3)
    (history,) = ctxbench("history", "--json").json
    for trend in history["trends"]:
        assert trend["raw_ratio"] == pytest.approx(1.3, rel=0.03)
        assert trend["ratio"] == pytest.approx(1.0, abs=0.01)
        assert [moment["steady_s"] for moment in trend["moments"]] == pytest.approx(
            [trend["moments"][0]["steady_s"]] * 3, rel=0.01
        )
    shown = ctxbench("history").out
    assert "AS MEASURED" in shown
    assert "1.300" in shown
    assert "▁▁▁" in shown


def test_without_a_reference_the_ratio_is_the_one_measured(write: Any, ctxbench: Any) -> None:
    write("a", 1, 1.0), write("b", 2, 1.5)
    (history,) = ctxbench("history", "--json").json
    assert {moment["steady_s"] for trend in history["trends"] for moment in trend["moments"]} == {None}
    assert "AS MEASURED" not in ctxbench("history").out


def test_what_has_no_history_is_refused(write: Any, ctxbench: Any) -> None:
    assert "not a run folder" in ctxbench("history", "nowhere").err
    a = write("a", 1, 1.0)
    for arguments in ((a,), (a, write("b", 2, 1.0, cpu="There")), (a, write("c", 3, 1.0, status="oom"))):
        refused = ctxbench("history", *arguments)
        assert (refused.code, "no two of the runs" in refused.err) == (2, True)


def test_a_run_found_by_looking_may_be_unreadable(write: Any, ctxbench: Any) -> None:
    write("a", 1, 1.0), write("b", 2, 1.0)
    broken = Path("runs/broken")
    broken.mkdir()
    (broken / "rows.jsonl").write_text('{"schema": "other"}\n')
    assert ctxbench("history").code == 0
    assert ctxbench("history", "runs/broken").code == 2


def test_bars() -> None:
    assert bars([1.0, 1.01, 1.04]) == "▁▁▁"
    assert bars([1.0, 2.0, 1.5]) == "▁█▅"
