"""``make gpu`` without a GPU: it says so; and with planted parts, it goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctxbench.devices import cuda_present
from ctxbench.suites.gpu import __main__ as suite


@pytest.mark.skipif(cuda_present(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_5(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ctxbench.suites.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "no CUDA device here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_measuring_needs_no_reporting_package() -> None:
    program = (
        "import sys\n"
        "for name in ('pandas', 'plotly', 'matplotlib', 'scipy'): sys.modules[name] = None\n"
        "import ctxbench.suites.gpu.__main__, ctxbench.suites.gpu.ratios, ctxbench.cli.run, ctxbench.run.server\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_finished_parts_are_not_done_again_and_failed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    codes, calls = {"tests": 0, "ratios": 1, "run": 0}, []

    def part(name: str):
        def do(out: Path, limit_s: float) -> int:
            calls.append((name, limit_s))
            return codes[name]

        return do

    monkeypatch.setattr(suite, "PARTS", {name: part(name) for name in codes})
    assert suite.do(list(codes), tmp_path, 100.0) == 1
    assert [name for name, _ in calls] == ["tests", "ratios", "run"]
    assert [round(limit) for _, limit in calls] == [30, 43, 100]
    codes["ratios"] = 0
    calls.clear()
    assert suite.do(list(codes), tmp_path, 100.0) == 0
    assert [name for name, _ in calls] == ["ratios"]
    assert json.loads((tmp_path / "parts.json").read_text()) == codes
    assert suite.do(["run"], tmp_path, 100.0, fresh=True) == 0
    assert [name for name, _ in calls] == ["ratios", "run"]


def test_a_part_that_takes_too_long_is_stopped_with_all_it_started_and_keeps_its_output(tmp_path: Path) -> None:
    program = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\nchild.wait()"
    assert suite._within([sys.executable, "-c", program], 3.0, tmp_path / "log") == 1
    child, *_, last = (tmp_path / "log").read_text().splitlines()
    assert last == "stopped after 3 s"
    ends = time.monotonic() + 20.0  # it was sent a signal, and dies when the machine comes to it
    while _runs(child) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: str) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_tests_that_passed_are_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "unknown_part"]
    passed = tmp_path / "passed.txt"
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = alone | {"CTXBENCH_PASSED": str(passed)}
    codes = [subprocess.run(command, capture_output=True, env=environment).returncode for _ in range(2)]
    assert codes == [0, suite.NO_TESTS]
    assert [line.rpartition("::")[2] for line in passed.read_text().splitlines()] == [
        "test_an_unknown_part_is_a_usage_error"
    ]


def test_an_unknown_part_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "speed"])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == 2
    assert "accepted: tests, ratios, run" in capsys.readouterr().err
