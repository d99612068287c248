"""``ctxbench compare``: table, JSON, gate and calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.cell import Cell
from ctxbench.rows import Gate, Latency, Row, row_for
from ctxbench.run.store import Store

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def row(length: int, seconds: float, count: int, impl: str = "blocked", status: str = "ok") -> Row:
    medians = [seconds * (1 + 0.0004 * index) for index in range(count)]
    latency = Latency(
        median=medians[0], low=medians[0], high=medians[-1], samples=[[value] * 3 for value in medians],
        n_processes=count,
    )  # fmt: skip
    cell = Cell(method="dense", impl=impl, seq_len=length)
    return row_for(cell, status, latency_s=latency if status == "ok" else None, gate=Gate(ok=True))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def write(name: str, factor: float = 1.0, count: int = 10, cpu: str = "Here", **changes: Any) -> str:
        with Store.open(Path(name)) as store:
            environment = {"cpu": {"model": cpu, "cores_usable": 2}}
            store.write_header({"command": "ctxbench run --methods all", "environment": environment})
            for length in LENGTHS:
                store.append_row(row(length, factor * 1e-6 * length, count, **changes))
        return name

    return write


def test_a_table_of_ratios_with_verdicts_and_reasons(runs: Any, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("compare", runs("a"), runs("b", 1.2))
    assert result.code == 0
    for part in ("above 1, B is slower", "dense / blocked", "32k", "1.200", "6 cells: 6 slower", "--calibrate"):
        assert part in result.out
    assert ctxbench("compare", "b", "a").out.count("faster") == 7
    assert "6 cells: 6 same" in ctxbench("compare", "a", "a").out


def test_cells_that_neither_run_tried_are_counted_in_one_line(runs: Any, ctxbench: Any) -> None:
    for name, status in (("a", "unsupported"), ("b", "skipped")):
        with Store.open(Path(runs(name))) as store:
            for impl in ("flash", "flex"):
                store.append_row(row_for(Cell(method="dense", impl=impl, seq_len=1024), status, "planted"))
    tried = row_for(Cell(method="dense", impl="graph", seq_len=1024), "oom", "planted")
    for name in "ab":
        with Store.open(Path(name)) as store:
            store.append_row(tried)
    shown = ctxbench("compare", "a", "b").out
    assert "skipped or unsupported in both: 2 cells (-v lists them)" in shown
    assert "9 cells: 6 same, 3 invalid" in shown
    assert ("flash" in shown, "graph" in shown) == (False, True)
    assert "flash" in ctxbench("compare", "a", "b", "-v").out


def test_the_gate_exits_with_3_only_for_cells_that_are_slower_by_as_much(runs: Any, ctxbench: Any) -> None:
    a, b = runs("a"), runs("b", 1.2)
    failed = ctxbench("compare", a, b, "--fail-on", "slower:5%")
    assert (failed.code, "FAILED: 6 cells are slower by at least 5 %" in failed.out) == (3, True)
    assert ctxbench("compare", a, b, "--fail-on", "slower:30%").code == 0
    assert ctxbench("compare", b, a, "--fail-on", "slower:5%").code == 0


def test_a_cell_that_fails_in_b_does_not_pass_the_gate(runs: Any, ctxbench: Any) -> None:
    result = ctxbench("compare", runs("a"), runs("b", status="oom"), "--fail-on", "slower:5%")
    assert (result.code, "6 cells that A measured failed in B" in result.out) == (1, True)
    assert ctxbench("compare", "a", "b").code == 0


def test_unclear_cells_come_with_the_command_that_decides_them(runs: Any, ctxbench: Any) -> None:
    found = ctxbench("compare", runs("a", count=3), runs("b", 1.2, count=3), "--json").json
    assert found["counts"] == {"unclear": 6}
    lengths = ",".join(map(str, LENGTHS))
    tail = f"--methods dense --impls blocked --seq {lengths} --processes 8"
    assert found["measure_again"] == [
        f"ctxbench run --methods all {tail} --out a-again", f"ctxbench run --methods all {tail} --out b-again"
    ]  # fmt: skip
    assert "7 would" in found["cells"][0]["reason"]
    with Store.open(Path("b")) as store:
        store.write_header({**store.header, "command": "ctxbench verify a -k 10"})
    assert ctxbench("compare", "a", "b", "--json").json["measure_again"][1] == f"ctxbench run {tail} --out b-again"


def test_two_impls_of_one_run(runs: Any, ctxbench: Any) -> None:
    folder = runs("a")
    with Store.open(Path(folder)) as store:
        for length in LENGTHS:
            store.append_row(row(length, 3e-6 * length, 10, impl="reference"))
    result = ctxbench("compare", "a:reference", "a:blocked")
    assert (result.code, "dense / reference > blocked" in result.out) == (0, True)
    assert "6 cells: 6 faster" in result.out
    assert ctxbench("compare", "a:flex", "a:blocked").code == 2


def test_a_calibration_is_stored_and_used(runs: Any, ctxbench: Any) -> None:
    a, other = runs("a"), runs("a2", 1.01)
    stored = ctxbench("compare", a, other, "--calibrate")
    assert (stored.code, "noise floor 1.0 % over 6 cells" in stored.out) == (0, True)
    found = ctxbench("compare", a, runs("b", 1.2), "--json").json
    assert found["cells"][0]["floor"] == pytest.approx(0.01, abs=1e-4)
    assert found["notes"] == []
    fine = ctxbench("compare", a, "b", "--fail-on", "slower:0.5%")
    assert (fine.code, "tighter than the noise floor of this machine, 1.0 %" in fine.err) == (2, True)


def test_a_run_says_nothing_about_itself(runs: Any, ctxbench: Any) -> None:
    a = runs("a")
    refused = ctxbench("compare", a, a, "--calibrate")
    assert (refused.code, "received one run twice" in refused.err) == (2, True)
    assert "A and B are the same rows" in ctxbench("compare", a, a).err


@pytest.mark.parametrize("gate", ["5%", "faster:5%", "slower:", "slower:200%", "slower:-1%"])
def test_a_malformed_gate_is_a_usage_error(gate: str, runs: Any, ctxbench: Any) -> None:
    assert ctxbench("compare", runs("a"), runs("b"), f"--fail-on={gate}").code == 2


def test_other_machines_and_missing_folders_are_usage_errors(runs: Any, ctxbench: Any) -> None:
    refused = ctxbench("compare", runs("a"), runs("b", cpu="There"))
    assert (refused.code, "--normalise" in refused.err) == (2, True)
    assert "invalid" in ctxbench("compare", "a", "b", "--normalise").out
    assert ctxbench("compare", "a", "nowhere").code == 2
    assert ctxbench("compare", "a", "nowhere:blocked").code == 2


class TestAgain:
    """``--again`` on a planted machine: it measures only what is unclear, and only where that repeats the run."""

    SMALL = ("run", "--methods", "dense", "--impls", "blocked", "--seq", "64..256", "--device", "cpu", "--no-report")

    @pytest.fixture
    def pair(self, instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctxbench: Any) -> Any:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        here = {"cpu": {"model": "Here", "cores_usable": 2}, "git": {"commit": "1" * 40}}
        monkeypatch.setattr("ctxbench.run.session.fingerprint", lambda: here)
        for name in ("a", "b"):
            assert ctxbench(*self.SMALL, "--processes", "3", "--out", f"runs/{name}").code == 0
        instant.tasks.clear()
        return instant

    def change(self, name: str, **environment: Any) -> None:
        with Store.open(Path("runs") / name) as store:
            store.write_header({**store.header, "environment": {**store.header["environment"], **environment}})

    def test_unclear_cells_are_measured_with_enough_processes_and_decided(self, pair: Any, ctxbench: Any) -> None:
        before = Path("runs/a/rows.jsonl").read_bytes()
        assert "3 unclear" in ctxbench("compare", "runs/a", "runs/b").out
        done = ctxbench("compare", "runs/a", "runs/b", "--again")
        assert (done.code, "3 cells: 3 same" in done.out) == (0, True)
        assert "3 of 3 unclear cells of a were measured again" in done.err
        assert sum(task.kind == "time" for task in pair.tasks) == 2 * 3 * 8
        assert Path("runs/a/rows.jsonl").read_bytes() == before
        assert len(list(Path("runs").glob("*-again-*"))) == 2

    def test_a_run_of_other_code_keeps_its_rows(self, pair: Any, ctxbench: Any) -> None:
        self.change("a", git={"commit": "2" * 40})
        done = ctxbench("compare", "runs/a", "runs/b", "--again")
        assert "a cannot be measured again here: the software differs: commit 222222222 and 111111111" in done.err
        assert len(list(Path("runs").glob("*-again-*"))) == 1

    def test_where_nothing_can_be_repeated_it_says_why(self, pair: Any, ctxbench: Any) -> None:
        self.change("a", git={"commit": "1" * 40, "changed": True})
        self.change("b", git={"commit": "3" * 40})
        refused = ctxbench("compare", "runs/a", "runs/b", "--again")
        assert refused.code == 2
        for text in ("a cannot be measured again here: its source or today's", "b cannot", "leave --again out"):
            assert text in refused.err
        assert not pair.tasks
