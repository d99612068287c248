"""Hands out measuring children: ``python -m ctxbench.run.server fork|spawn``, one JSON line a task, one at a time.

``fork`` imports torch once, without running an operator or touching a device, and forks a child a task: it starts in
milliseconds, and all children have the same memory behind them. ``spawn`` starts a fresh interpreter a task, which
CUDA needs. A child has a session of its own; whatever happens in it, and whatever it leaves behind, ends with it. When
the client dies, its end of the pipe closes, and the server ends its child and itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec

from ctxbench.run.tasks import Outcome, Report, Request

LOG_BYTES = 16_384  # the end of what a child printed
MARGIN_BYTES, THREAD_BYTES = 64 * 2**20, 16 * 2**20  # address space for libraries, and for the stack of a thread
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WORKER = "worker"  # argument of a spawned child


class Server:
    """The loop: a request in, a child, a report out."""

    def __init__(self, requests: int, reports: int, isolate: str):
        self.requests, self.reports, self.isolate = requests, reports, isolate
        self.pending = b""

    def serve(self) -> None:
        """Run tasks until the client closes its end."""
        self.send(Report(pid=os.getpid()))
        while (line := self.receive()) is not None:
            self.send(self.run(msgspec.json.decode(line, type=Request)))

    def receive(self) -> bytes | None:
        while b"\n" not in self.pending:
            data = os.read(self.requests, 1 << 16)
            if not data:
                return None
            self.pending += data
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def send(self, report: Report) -> None:
        write_all(self.reports, msgspec.json.encode(report) + b"\n")

    def run(self, request: Request) -> Report:
        """Start a child, watch it to its end or to its deadline, and clear up behind it."""
        started, kills = time.monotonic(), oom_kills()
        result, result_end = os.pipe()
        log, log_end = os.pipe()
        pid = self.fork(request, result_end, log_end) if self.isolate == "fork" else spawn(request, result_end, log_end)
        os.close(result_end)
        os.close(log_end)
        self.send(Report(pid=pid))
        payload, printed, timed_out = self.watch(pid, result, log, started + request.timeout_s)
        end_group(pid)
        _, status = os.waitpid(pid, 0)
        end_orphans()
        elapsed = time.monotonic() - started
        os.close(result)
        os.close(log)
        return Report(
            pid=pid, ended=True, exit_code=os.waitstatus_to_exitcode(status), timed_out=timed_out,
            outcome=read_outcome(payload),
            log=printed.decode(errors="replace"), elapsed_s=elapsed, oom_kills=oom_kills() - kills,
        )  # fmt: skip

    def fork(self, request: Request, result: int, log: int) -> int:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(self.requests)
            os.close(self.reports)
            become_child(log)
            if os.getppid() != server:  # it died before the kernel was asked to tell
                os._exit(1)
            limit_memory(request)
            work(request, result)
        return pid

    def watch(self, pid: int, result: int, log: int, deadline: float) -> tuple[bytes, bytes, bool]:
        """Collect a child's result and the end of its log until it has ended; ends it at the deadline."""
        payload, printed, timed_out = b"", b"", False
        for stream in (result, log):
            os.set_blocking(stream, False)
        ended = os.pidfd_open(pid)
        poll = select.poll()
        for stream in (result, log, ended):
            poll.register(stream, select.POLLIN)
        poll.register(self.requests, select.POLLHUP)
        try:
            running = True
            while running:
                left = deadline - time.monotonic()
                if left <= 0 and not timed_out:
                    timed_out = True
                    end_group(pid)
                ready = dict(poll.poll(None if timed_out else max(1, int(1000 * left))))
                if self.requests in ready:  # the client is gone
                    end_group(pid)
                    end_orphans()
                    sys.exit(1)
                running = ended not in ready
                payload += drain(result, poll)
                printed = (printed + drain(log, poll))[-LOG_BYTES:]
        finally:
            os.close(ended)
        return payload, printed, timed_out


def read_outcome(payload: bytes) -> Outcome | None:
    """The outcome a child delivered, or None when it died before or while it wrote."""
    try:
        return msgspec.json.decode(payload, type=Outcome)
    except msgspec.DecodeError:
        return None


def drain(stream: int, poll: select.poll) -> bytes:
    """Everything that can be read now; a stream at its end is watched no longer."""
    data = b""
    while True:
        try:
            chunk = os.read(stream, 1 << 16)
        except BlockingIOError:
            return data
        if not chunk:
            with contextlib.suppress(KeyError):
                poll.unregister(stream)
            return data
        data = (data + chunk)[-(1 << 26) :]


def spawn(request: Request, result: int, log: int) -> int:
    """Start a fresh interpreter for one task; the request comes through its standard input."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-P", "-m", "ctxbench.run.server", WORKER, str(result), str(log)], stdin=subprocess.PIPE,
        stdout=log, stderr=log, pass_fds=(result, log),
    )  # fmt: skip
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(msgspec.json.encode(request))
        child.stdin.close()
    child.returncode = 0  # the server itself waits for it
    return child.pid


def become_child(log: int) -> None:
    """Take a session of its own, print into the log, and die with the server."""
    os.setsid()
    die_with_parent()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # if memory runs out, the kernel shall take the child, not the supervisor
        Path("/proc/self/oom_score_adj").write_text("1000")


def limit_memory(request: Request) -> None:
    """Bound the address space: what is mapped already, the memory limit, and a margin that holds no tensors.

    A kept heap asks for its pad with every growth.
    """
    if request.memory_limit is None:
        return
    import torch

    threads = (request.task.cell.threads if request.task.cell else 0) or torch.get_num_threads()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    pad = int(os.environ.get("MALLOC_TOP_PAD_", "0"))
    limit = mapped + request.memory_limit + MARGIN_BYTES + threads * THREAD_BYTES + pad
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def work(request: Request, result: int) -> NoReturn:
    """Run the task, deliver its outcome and leave at once: no exit handler of a plug-in runs."""
    code = 1
    try:
        import faulthandler

        from ctxbench.run.worker import run_task

        faulthandler.enable()  # a crash leaves its Python lines in the log
        outcome = run_task(request.task)
        write_all(result, msgspec.json.encode(outcome) + b"\n")
        code = 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def write_all(stream: int, data: bytes) -> None:
    """Write every byte."""
    view = memoryview(data)
    while view:
        view = view[os.write(stream, view) :]


def end_group(pid: int) -> None:
    """Kill a child and everything in its session's group; it must not have been waited for."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def end_orphans() -> None:
    """Kill what a dead child left behind in other sessions: it was handed to this process."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    for _ in range(100):  # an orphan's own children appear after it has died
        try:
            orphans = [int(pid) for pid in listing.read_text().split()]
        except OSError:
            return
        if not orphans:
            return
        for pid in orphans:
            end_group(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def oom_kills() -> int:
    """Processes the kernel has killed for want of memory since boot; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the process that started this one ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def preload() -> None:
    """Import what every child needs and warm the tracer, which takes most of a second, without starting a thread."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    import ctxbench.run.worker  # noqa: F401

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.nn.Linear(8, 8)(torch.randn(2, 4, 8)).softmax(-1)
    gc.collect()
    gc.freeze()  # what is here now is shared with all children: no collection shall write to it


def main(arguments: list[str]) -> None:
    """Serve (``fork`` or ``spawn``), or be one spawned child (``worker RESULT LOG``)."""
    with contextlib.suppress(OSError):  # last: a plug-in may be a module here, but a random.py shadows nothing (-P)
        sys.path.append(str(Path.cwd()))
    if arguments[0] == WORKER:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        become_child(int(arguments[2]))
        work(request, int(arguments[1]))
    requests, reports = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # a stray print must not look like a report
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    if arguments[0] == "fork":
        preload()
    Server(requests, reports, arguments[0]).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
