"""Whatever a child does, its server lives, its outcome is clear, and nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from ctxbench.cell import Cell
from ctxbench.errors import EnvironmentUnusable
from ctxbench.run.client import Server
from ctxbench.run.tasks import Outcome, Protocol, Task

PLUGIN = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
import torch
from torch import nn
from ctxbench.method import Method

HERE = Path(__file__).parent

class Layer(nn.Module):
    def forward(self, x):
        (HERE / "pid").write_text(str(os.getpid()))
        {body}
        return x + 1

METHOD = Method(name="planted", build=lambda *_: Layer())
"""
QUICK = Protocol(min_samples=3, sample_budget_s=0.01)
LIMIT = 512 * 2**20
SLEEPER = 'subprocess.Popen(["sleep", "600"]{options})'


def task_for(folder: Path, body: str) -> Task:
    plugin = folder / "planted.py"
    plugin.write_text(PLUGIN.replace("{body}", body))
    cell = Cell(method="planted", impl="reference", seq_len=16, d_model=8, num_heads=2, d_ff=0, threads=1)
    return Task(kind="time", cell=cell, origin=f"plugin:{plugin}", protocol=QUICK)


@pytest.fixture(scope="module")
def shared_server():
    with Server("timing", threads=1) as server:
        yield server


@pytest.fixture
def submit(shared_server: Server, tmp_path: Path):
    """Run a module with this line in its forward; afterwards the same server must still measure."""

    def run(body: str, timeout_s: float = 60.0, memory_limit: int | None = LIMIT) -> Outcome:
        outcome = shared_server.submit(task_for(tmp_path, body), timeout_s, memory_limit)
        sound = tmp_path / "sound"
        sound.mkdir()
        assert shared_server.submit(task_for(sound, "pass"), 60.0).status == "ok"
        return outcome

    return run


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(*pids: int, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.02)


def read_pid(path: Path, limit_s: float = 60.0) -> int:
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(path.read_text())
        assert time.monotonic() < deadline, f"{path.name} was never written"
        time.sleep(0.02)


def test_a_sound_child_delivers_its_samples(submit):
    outcome = submit("pass")
    assert outcome.status == "ok"
    assert len(outcome.samples.samples) >= 3
    assert outcome.elapsed_s > 0


def test_files_of_the_folder_that_it_is_started_in_shadow_no_module(tmp_path, monkeypatch):
    for name in ("random.py", "torch.py", "msgspec.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    task = task_for(tmp_path, "pass")
    monkeypatch.chdir(tmp_path)
    for origin in (task.origin, "planted"):  # a module of that folder is found all the same
        with Server("timing", threads=1) as server:
            outcome = server.submit(msgspec.structs.replace(task, origin=origin), 60.0)
            assert outcome.status == "ok", outcome.reason


def test_an_impossible_allocation_is_oom_with_its_size_and_place(submit):
    outcome = submit("scores = torch.empty(1 << 44, dtype=torch.uint8)")
    assert outcome.status == "oom"
    assert "16.0 TiB" in outcome.reason
    assert "planted.py" in outcome.reason
    assert "torch.empty(1 << 44" in outcome.reason
    assert "x [1, 16, 8]" in outcome.reason


def test_the_memory_limit_is_enforced(submit):
    outcome = submit("torch.ones(2**32, dtype=torch.uint8)", memory_limit=LIMIT)
    assert outcome.status == "oom"
    assert "4.00 GiB" in outcome.reason


def test_what_fits_below_the_memory_limit_runs(submit):
    assert submit("torch.ones(2**28, dtype=torch.uint8)", memory_limit=LIMIT).status == "ok"


def test_the_kept_heap_times_no_page_faults_and_does_not_outgrow_what_lives(submit):
    body = "kept = [torch.ones(2**27, dtype=torch.uint8) for _ in range(3)]; kept[0].clone(); del kept"
    outcome = submit(body, memory_limit=640 * 2**20)  # 512 MiB live at once: more than four fifths of the limit
    assert outcome.status == "ok", outcome
    assert outcome.samples.faults_per_call < 2**27 / 4096 / 100  # of those a fresh block would take


def test_a_hanging_child_is_ended_with_everything_it_started(submit, tmp_path):
    body = "; ".join(
        f'(HERE / "{name}").write_text(str({SLEEPER.format(options=options)}.pid))'
        for name, options in (("same", ""), ("own", ", start_new_session=True"))
    )
    outcome = submit(f"{body}; time.sleep(600)", timeout_s=3.0)
    assert outcome.status == "timeout"
    assert outcome.reason == "no result within 3.00 s"
    wait_until_dead(*(read_pid(tmp_path / name) for name in ("pid", "same", "own")))


def test_what_a_finished_child_left_running_is_ended(submit, tmp_path):
    start = SLEEPER.format(options=", start_new_session=True")
    line = f'(HERE / "left").exists() or (HERE / "left").write_text(str({start}.pid))'
    assert submit(line).status == "ok"
    wait_until_dead(read_pid(tmp_path / "left"))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("os.abort()", "killed", "SIGABRT"),
        ("ctypes.string_at(0)", "killed", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed", "SIGKILL"),
        ("os._exit(3)", "error", "exit code 3 before it delivered a result"),
        ("sys.exit(5)", "error", "called exit(5)"),
        ("raise KeyboardInterrupt", "error", "KeyboardInterrupt"),
        ("raise MemoryError('planted')", "oom", "allocation failed"),
        ("raise ValueError('planted fault')", "error", "ValueError: planted fault at"),
    ],
    ids=["abort", "segfault", "sigkill", "os._exit", "sys.exit", "interrupt", "memory error", "exception"],
)  # fmt: skip
def test_the_way_a_child_ends_is_named(submit, body: str, status: str, words: str):
    outcome = submit(body)
    assert (outcome.status, words in outcome.reason) == (status, True), outcome


def test_a_crash_leaves_its_python_lines_in_the_detail(submit):
    assert "planted.py" in submit("ctypes.string_at(0)").detail


def test_an_exception_leaves_its_traceback_and_the_last_lines_printed(submit):
    outcome = submit("print('last words'); raise ValueError('planted fault')")
    assert "planted fault" in outcome.detail
    assert "last words" in outcome.detail


def test_printing_without_end_neither_blocks_nor_fills_the_row(submit):
    outcome = submit("print('x' * 10**6); os.write(1, b'{}' * 10**5); sys.stderr.write('e' * 10**6)")
    assert outcome.status == "ok"
    assert len(outcome.detail) < 10_000


def test_a_failing_child_that_prints_much_keeps_the_end_only(submit):
    outcome = submit("print('\\n'.join(map(str, range(10**5)))); raise ValueError('planted')")
    assert "99999" in outcome.detail
    assert len(outcome.detail) < 10_000


def test_a_server_that_was_killed_is_replaced(tmp_path):
    with Server("timing", threads=1) as server:
        assert server.submit(task_for(tmp_path, "pass"), 60.0).status == "ok"
        os.kill(server.pid, signal.SIGKILL)
        assert server.submit(task_for(tmp_path, "pass"), 60.0).status == "ok"


def test_a_server_killed_at_work_takes_its_child_along(tmp_path):
    with Server("timing", threads=1) as server:
        server.submit(task_for(tmp_path, "pass"), 60.0)
        (tmp_path / "pid").unlink()
        first = server.pid

        def kill() -> None:
            read_pid(tmp_path / "pid")
            os.kill(first, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        outcome = server.submit(task_for(tmp_path, "time.sleep(600)"), 60.0)
        thread.join()
        assert (outcome.status, outcome.reason) == ("killed", "its server died")
        wait_until_dead(read_pid(tmp_path / "pid"), first)


@pytest.fixture
def heeds_ctrl_c():
    """What a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_child_and_is_raised_again(tmp_path):
    with Server("timing", threads=1) as server:
        server.submit(task_for(tmp_path, "pass"), 60.0)
        (tmp_path / "pid").unlink()

        def interrupt() -> None:
            read_pid(tmp_path / "pid")
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            server.submit(task_for(tmp_path, "time.sleep(600)"), 60.0)
        thread.join()
        wait_until_dead(read_pid(tmp_path / "pid"))
        assert server.submit(task_for(tmp_path, "pass"), 60.0).status == "ok"


def test_killing_the_supervisor_leaves_no_process(tmp_path):
    task_for(tmp_path, '(HERE / "server").write_text(str(os.getppid())); time.sleep(600)')
    script = f"""
from ctxbench.cell import Cell
from ctxbench.run.client import Server
from ctxbench.run.tasks import Task
cell = Cell(method="planted", impl="reference", seq_len=16, d_model=8, num_heads=2, d_ff=0, threads=1)
Server("memory", threads=1)
Server("timing", threads=1).submit(Task(kind="time", cell=cell, origin="plugin:{tmp_path}/planted.py"), 600.0)
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    server, child = read_pid(tmp_path / "server"), read_pid(tmp_path / "pid")
    others = [int(pid) for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()]
    assert server in others
    assert len(others) == 2
    supervisor.kill()
    supervisor.wait()
    wait_until_dead(child, *others)


def test_a_spawned_child_works_like_a_forked_one(tmp_path):
    with Server("timing", threads=1, isolate="spawn") as server:
        assert server.submit(task_for(tmp_path, "pass"), 60.0).status == "ok"
        outcome = server.submit(task_for(tmp_path, "os.abort()"), 60.0)
        assert "SIGABRT" in outcome.reason
        outcome = server.submit(task_for(tmp_path, "time.sleep(600)"), 8.0)
        assert outcome.status == "timeout"


def test_a_server_that_cannot_start_says_what_it_heard(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('a planted, broken torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Server("timing") as server, pytest.raises(EnvironmentUnusable, match="a planted, broken torch"):
        server.submit(task_for(tmp_path, "pass"), 60.0)


def test_the_server_runs_one_thread_before_it_forks(shared_server, tmp_path):
    shared_server.submit(task_for(tmp_path, "pass"), 60.0)
    assert len(list(Path(f"/proc/{shared_server.pid}/task").iterdir())) == 1


def test_the_client_imports_no_torch():
    code = "import sys, ctxbench.run.client, ctxbench.env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_heap_is_refused():
    with pytest.raises(ValueError, match="timing, memory, shipped"):
        Server("other")
