"""The supervisor's end of a fork server. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

import msgspec

from ctxbench.errors import EnvironmentUnusable
from ctxbench.run import failures
from ctxbench.run.tasks import Outcome, Report, Request, Task

START_LIMIT_S = 120.0  # a cold import of torch from a slow disk
GRACE_S = 15.0  # how much later than a child's deadline its server may answer

# glibc reads these when a process starts. timing: freed blocks stay in the process, as on a GPU's caching allocator.
# Its thread caches would hold back the splinters that aligned blocks leave, so that no freed block could be used again
# and the heap grew to twice what lives: they are off. memory: every large block is mapped alone and given back when it
# is freed, so that the resident set follows the tensors.
HEAPS = {
    "timing": {
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**28),
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
    },
    "memory": {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"},
    "shipped": {},
}


class Server:
    """A server process with one heap setting and one number of threads, started at once and again when it has died.

    Args:
        heap: one of HEAPS.
        threads: threads of every child; 0 leaves the choice to torch.
        device: ``cpu`` or a CUDA device.
        isolate: ``fork`` or ``spawn``; by default CUDA devices spawn.

    Raises:
        EnvironmentUnusable: on a system whose processes cannot be watched this way.
    """

    def __init__(self, heap: str, threads: int = 0, device: str = "cpu", isolate: str = ""):
        self.isolate = isolate or ("spawn" if device.startswith("cuda") else "fork")
        if heap not in HEAPS or self.isolate not in ("fork", "spawn"):
            raise ValueError(f"expected a heap of {', '.join(HEAPS)} and fork or spawn, received {heap!r}, {isolate!r}")
        if not hasattr(os, "pidfd_open"):
            raise EnvironmentUnusable(
                f"measuring needs Linux 5.3 or newer\n  received: {sys.platform}\n"
                "  plan, list, describe and report work here"
            )
        self.heap, self.threads = heap, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._pending = b""
        self._child = 0
        self._start()

    def submit(self, task: Task, timeout_s: float, memory_limit: int | None = None) -> Outcome:
        """Run a task in a child and wait for its outcome, whatever that is.

        Ctrl-C ends the child and the server and is raised again; the next task starts a new server.

        Args:
            task: what to do.
            timeout_s: after this the child's whole process group is killed.
            memory_limit: bytes the child may take; not enforced in spawned children.

        Raises:
            EnvironmentUnusable: when no server can be started here.
        """
        limit = memory_limit if self.isolate == "fork" else None
        request = Request(task=task, timeout_s=timeout_s, memory_limit=limit)
        try:
            report = self._exchange(request)
            if report is None and not self._child:  # the server had died before it could begin: a new one can
                self._kill()
                report = self._exchange(request)
        except BaseException:
            self._kill()
            raise
        if report is not None:
            return failures.of_report(report, request)
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        late, log = self._process.returncode is None, self._last_errors()
        self._kill()
        status, reason = ("timeout", "neither child nor server answered") if late else ("killed", "its server died")
        return Outcome(status=status, reason=reason, detail=log)

    def _exchange(self, request: Request) -> Report | None:
        """Hand a request over and wait for the final report; None when the server died or never answered."""
        self._ready()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        deadline = time.monotonic() + request.timeout_s + GRACE_S
        while (report := self._receive(deadline)) is not None and not report.ended:
            self._child = report.pid
        if report is not None:
            self._child = 0
        return report

    @property
    def pid(self) -> int:
        """The server's process; 0 while there is none."""
        return self._process.pid if self._process else 0

    def close(self) -> None:
        """End the server; a child that runs is ended with it."""
        self._kill()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        environment = {**os.environ, **HEAPS[self.heap], "OPENBLAS_NUM_THREADS": "1"}  # a pool would not survive a fork
        if self.threads:
            environment |= {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        self._pending, self._child = b"", 0
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-P", "-m", "ctxbench.run.server", self.isolate], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, env=environment, start_new_session=True,
        )  # fmt: skip
        self._greeted = False

    def _ready(self) -> None:
        if self._process is not None and self._greeted and self._process.poll() is not None:
            self._kill()
        if self._process is None:
            self._start()
        if not self._greeted:
            if self._receive(time.monotonic() + START_LIMIT_S) is None:
                log = self._last_errors()
                self._kill()
                raise EnvironmentUnusable(f"the measuring process could not start\n  it said: {log or '(nothing)'}")
            self._greeted = True

    def _receive(self, deadline: float) -> Report | None:
        """The next report, or None when the server has died or the deadline has passed."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(stream, select.POLLIN)
        while b"\n" not in self._pending:
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            data = os.read(stream, 1 << 20) if ready else b""
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return msgspec.json.decode(line, type=Report)

    def _last_errors(self) -> str:
        self._errors.seek(0)
        return str(self._errors.read().decode(errors="replace").strip()[-failures.DETAIL :])

    def _kill(self) -> None:
        """End the server and its child: closing the pipe does it where the server lives, a signal where it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0 if self._greeted else 0.0)
        if process.poll() is None:
            process.kill()
            process.wait()
        if self._child and process.returncode < 0:  # the server could not clear up behind itself
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child, signal.SIGKILL)
        self._child = 0
        self._errors.close()
