"""``ctxbench run``: folder, table, report, exit codes. Most runs use executors that need no torch."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxbench.devices import cuda_present
from ctxbench.run.store import read_rows, read_run
from ctxbench.run.tasks import Outcome, Task

SMALL = ("--methods", "dense", "--impls", "blocked", "--seq", "64,128", "--device", "cpu")


def run(ctxbench: Callable[..., Any], *arguments: str) -> Any:
    return ctxbench("run", *SMALL, "--no-report", *arguments)


def test_a_run_ends_with_a_table_counts_and_paths(instant: Any, ctxbench: Callable[..., Any]) -> None:
    result = run(ctxbench)
    (folder,) = Path("runs").iterdir()
    assert result.code == 0
    for part in ("Fastest impl", "dense", "10.0 ms", "2 cells: 2 ok", f"{folder}/rows.jsonl"):
        assert part in result.out
    assert "2/2  dense / blocked  128" in result.err
    assert [row.status for row in read_rows(folder)] == ["ok", "ok"]


def test_run_json_tells_what_was_done_where_and_how(instant: Any, ctxbench: Callable[..., Any]) -> None:
    run(ctxbench, "--out", "here")
    header = read_run(Path("here"))
    assert (header["status"], header["suite"], header["counts"]) == ("finished", "scaling", {"ok": 2})
    assert header["command"] == "ctxbench run " + " ".join([*SMALL, "--no-report", "--out", "here"])
    assert header["environment"]["torch_view"] == {"torch": "planted"}
    assert header["calibration"]["cpu"]["flops_per_s"] == {"fp32": 1e12}
    assert header["config"]["origins"]["axes.seq_len"] == "flag"
    assert header["versions"]["torch"]
    assert header["sessions"][0]["ended_at"]


def test_json_says_where_the_rows_are(instant: Any, ctxbench: Callable[..., Any]) -> None:
    found = run(ctxbench, "--json", "--out", "here").json
    assert (found["folder"], found["counts"], found["exit_code"]) == ("here", {"ok": 2}, 0)


def test_quiet_prints_only_paths(instant: Any, ctxbench: Callable[..., Any]) -> None:
    result = run(ctxbench, "-q", "--out", "here")
    assert (result.out, result.err) == ("rows    here/rows.jsonl\n", "")


def test_a_failed_cell_exits_1_and_is_named(instant: Any, ctxbench: Callable[..., Any]) -> None:
    instant.fate = lambda task: (
        Outcome(status="error", reason="ValueError: planted")
        if task.kind == "time" and task.cell.seq_len == 128
        else None
    )
    result = run(ctxbench)
    assert result.code == 1
    assert "error: dense / blocked at 128, forward: ValueError: planted" in result.out


def test_a_skip_is_no_failure(instant: Any, ctxbench: Callable[..., Any]) -> None:
    result = run(ctxbench, "--memory-limit", "1KiB")
    assert result.code == 0
    assert "2 cells: 2 skipped" in result.out


def test_an_interrupted_run_exits_130_and_continues_with_out_alone(instant: Any, ctxbench: Callable[..., Any]) -> None:
    def interrupt(task: Task) -> Outcome | None:
        if task.kind == "time" and task.cell.seq_len == 128:
            raise KeyboardInterrupt
        return None

    instant.fate = interrupt
    result = run(ctxbench, "--out", "here")
    assert result.code == 130
    assert "continue with `ctxbench run --out here`" in result.err
    assert [row.seq_len for row in read_rows(Path("here"))] == [64]
    assert read_run(Path("here"))["status"] == "interrupted"
    instant.fate, instant.tasks = (lambda task: None), []
    again = ctxbench("run", "--out", "here", "--no-report")
    assert again.code == 0
    assert "1 of 2 cells are already measured" in again.err
    assert set(instant.measured()) == {128}
    assert [row.seq_len for row in read_rows(Path("here"))] == [64, 128]
    assert len(read_run(Path("here"))["sessions"]) == 2


def test_a_finished_run_is_not_measured_again_unless_asked(instant: Any, ctxbench: Callable[..., Any]) -> None:
    run(ctxbench, "--out", "here")
    for arguments, cells in (((), 0), (("--rerun", "failed"), 0), (("--rerun", "all"), 2), (("--fresh",), 2)):
        instant.tasks = []
        assert run(ctxbench, "--out", "here", *arguments).code == 0
        assert len(set(instant.measured())) == cells, arguments
        assert len(read_rows(Path("here"))) == 2


def test_continuing_without_the_plug_in_of_a_run_says_how_to_name_it(
    instant: Any, ctxbench: Callable[..., Any]
) -> None:
    Path("mine.py").write_text(PLUGIN)
    mine = ("--plugin", "mine.py", "--no-report", "--out", "here")
    assert ctxbench("run", "--methods", "mine", "--seq", "64", "--device", "cpu", *mine).code == 0
    result = ctxbench("run", "--out", "here")
    assert result.code == 2
    assert "measures mine, which is not installed" in result.err
    assert "--plugin PATH" in result.err
    assert ctxbench("run", *mine).code == 0


def test_another_configuration_in_the_same_folder_is_refused(instant: Any, ctxbench: Callable[..., Any]) -> None:
    run(ctxbench, "--out", "here")
    before = Path("here/rows.jsonl").read_bytes()
    result = run(ctxbench, "--out", "here", "--batch", "2")
    assert result.code == 2
    assert "another configuration: batch_size was [1], now [2]" in result.err
    assert Path("here/rows.jsonl").read_bytes() == before
    assert run(ctxbench, "--out", "here", "--budget", "3m").code == 0
    assert run(ctxbench, "--out", "here", "--batch", "2", "--fresh").code == 0


def test_a_locked_folder_is_refused(instant: Any, ctxbench: Callable[..., Any]) -> None:
    Path("here").mkdir()
    with Path("here/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        result = run(ctxbench, "--out", "here")
    assert result.code == 2
    assert "another run (process 4711) is writing to here" in result.err


def test_a_truncated_last_row_is_measured_again_with_a_note(instant: Any, ctxbench: Callable[..., Any]) -> None:
    run(ctxbench, "--out", "here")
    rows = Path("here/rows.jsonl")
    os.truncate(rows, rows.stat().st_size - 30)
    result = run(ctxbench, "--out", "here")
    assert result.code == 0
    assert "the last line of rows.jsonl was incomplete" in result.err
    assert len(read_rows(Path("here"))) == 2


def test_rows_of_another_schema_are_refused(instant: Any, ctxbench: Callable[..., Any]) -> None:
    run(ctxbench, "--out", "here")
    rows = Path("here/rows.jsonl")
    rows.write_text(rows.read_text().replace("ctxbench.row/1", "ctxbench.row/9"))
    result = run(ctxbench, "--out", "here")
    assert result.code == 2
    assert "is of the schema 'ctxbench.row/9'" in result.err


def test_a_folder_that_cannot_be_written_exits_5(instant: Any, ctxbench: Callable[..., Any]) -> None:
    Path("file").write_text("")
    result = run(ctxbench, "--out", "file/here")
    assert result.code == 5
    assert "cannot write to" in result.err


def test_a_full_disk_exits_5_and_keeps_what_is_finished(
    instant: Any, ctxbench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def fill(task: Task) -> None:
        if task.kind == "time" and task.cell.seq_len == 128:
            monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:20]))

    instant.fate = fill  # type: ignore[assignment]
    result = run(ctxbench, "--out", "here")
    monkeypatch.setattr(os, "write", write)
    assert result.code == 5
    assert "no space left for here" in result.err
    assert [row.seq_len for row in read_rows(Path("here"))] == [64]
    instant.fate = lambda task: None
    assert run(ctxbench, "--out", "here").code == 0
    assert len(read_rows(Path("here"))) == 2


def test_a_cuda_device_that_is_absent_exits_5(instant: Any, ctxbench: Callable[..., Any]) -> None:
    if cuda_present():
        pytest.skip("this machine has a CUDA device")
    result = ctxbench("run", "--methods", "dense", "--device", "cuda")
    assert result.code == 5
    assert "not usable here" in result.err
    assert not Path("runs").exists()


@pytest.mark.parametrize("flag", ["--dry-run", "--print-config"])
def test_looking_first_writes_nothing(flag: str, instant: Any, ctxbench: Callable[..., Any]) -> None:
    result = run(ctxbench, flag)
    assert result.code == 0
    assert "64" in result.out
    assert instant.tasks == []
    assert not Path("runs").exists()


def test_rerun_without_a_folder_is_a_usage_error(instant: Any, ctxbench: Callable[..., Any]) -> None:
    result = run(ctxbench, "--rerun", "failed")
    assert result.code == 2
    assert "--out FOLDER" in result.err


def test_a_report_is_written_beside_the_rows(instant: Any, ctxbench: Callable[..., Any]) -> None:
    result = ctxbench("run", *SMALL, "--out", "here")
    assert result.code == 0
    assert "report  here/report.html" in result.out
    assert b"<html" in Path("here/report.html").read_bytes()


PLUGIN = """
import torch
from ctxbench.method import Method

class Mine(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = torch.nn.Linear(width, width)

    def forward(self, x):
        if x.shape[1] == 48:
            raise RuntimeError("planted")
        return self.mix(x)

def build(dims, params, impl, device, dtype):
    return Mine(dims.d_model).to(device, dtype)

METHOD = Method(name="mine", build=build)
"""


@pytest.mark.slow
def test_a_real_run_measures_a_plug_in_beside_dense_and_never_imports_torch_here(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    flags = (
        "--methods mine,dense --impls reference --seq 32,48 --d-model 32 --processes 2 --json --no-report --out here"
    )
    code = (
        "import sys\nfrom ctxbench.cli import main\ntry:\n    main()\nfinally:\n"
        "    assert not {'torch', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "run", *flags.split(), "--plugin", "mine.py", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr[-2000:]
    found = {(row.method, row.seq_len): row for row in read_rows(tmp_path / "here")}
    assert json.loads(done.stdout)["cells"] == len(found) == 4
    assert "planted" in found["mine", 48].reason
    for key in (("mine", 32), ("dense", 32), ("dense", 48)):
        row = found[key]
        assert row.measured, (key, row.status, row.reason)
        assert row.latency_s.n_processes >= 2
        assert row.peak_bytes.allocated > 0
    assert found["mine", 32].flops.counted == 2 * 32 * 32 * 32
    assert found["dense", 48].flops.counted == found["dense", 48].flops.formula
