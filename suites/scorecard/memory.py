"""Workloads whose peak is known, two tensors of so many MiB at once: what each meter says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ctxbench.run.client import HEAPS
from ctxbench.suites.scorecard.card import Score

MIB = 2**20
SIZES = (1, 16, 128, 512)
WORK = """
import sys, torch
torch.set_num_threads(1)
torch.ones(8).clone()
def work(mib=int(sys.argv[1])):
    first = torch.ones(mib << 18)
    return first.clone()
"""


def measure(tool: str, done: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes that a meter gives, by MiB of one tensor."""
    return {str(mib): METERS[tool][0](mib) for mib in SIZES}


def scores(raws: dict[str, dict[str, int]]) -> Iterator[Score]:
    """A line a meter, a column a size: its error on a peak of twice the size."""
    for tool, found in raws.items():
        for size, measured in found.items():
            error = 100 * (measured / (2 * int(size) * MIB) - 1)
            common = {"section": "memory", "tool": tool, "work": "two tensors", "note": METERS[tool][1]}
            yield Score(quantity=f"{2 * int(size)} MiB", value=error, unit="%", **common)


def _events(mib: int) -> int:
    return _python(mib, "from ctxbench.measure import memory\nprint(memory.measure(work).allocated)\n")


def _resident(mib: int) -> int:
    return _python(mib, "from ctxbench.measure import memory\nprint(memory.measure(work).resident)\n")


def _tracemalloc(mib: int) -> int:
    tail = "import tracemalloc\ntracemalloc.start()\nkept = work()\nprint(tracemalloc.get_traced_memory()[1])\n"
    return _python(mib, tail)


def _polling(mib: int) -> int:
    return _python(
        mib,
        "import psutil, threading, time\nprocess, seen, done = psutil.Process(), [], threading.Event()\n"
        "def poll():\n    while not done.is_set():\n"
        "        seen.append(process.memory_info().rss)\n        time.sleep(0.01)\n"
        "before = process.memory_info().rss\nthread = threading.Thread(target=poll)\nthread.start()\n"
        "kept = work()\ndone.set()\nthread.join()\nprint(max(seen) - before)\n",
    )


def _maxrss(mib: int) -> int:
    """What asv's peakmem reads: the high-water mark of the whole process, the interpreter and torch included."""
    return _python(
        mib, "import resource\nkept = work()\nprint(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )


def _memray(mib: int) -> int:
    """Its own peak, less that of the same program without the work."""
    peaks = []
    for tail in ("kept = work()\n", ""):
        with tempfile.TemporaryDirectory() as folder:
            program, out = Path(folder) / "work.py", Path(folder) / "out.bin"
            program.write_text(WORK + tail)
            _run([sys.executable, "-m", "memray", "run", "-q", "-o", str(out), str(program), str(mib)])
            stats = Path(folder) / "stats.json"
            _run([sys.executable, "-m", "memray", "stats", "--json", "-o", str(stats), "-f", str(out)])
            peaks.append(int(json.loads(stats.read_text())["metadata"]["peak_memory"]))
    return peaks[0] - peaks[1]


def _python(mib: int, tail: str) -> int:
    return int(_run([sys.executable, "-c", WORK + tail, str(mib)]).split()[-1])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **HEAPS["memory"]})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed: {done.stderr[-500:]}")
    return done.stdout


METERS: dict[str, tuple[Callable[[int], int], str]] = {
    "ctxbench, allocator": (_events, "the allocator's own events"),
    "ctxbench, resident": (_resident, "the kernel's high-water mark, reset before the call"),
    "memray": (_memray, "less the peak of the program without the work"),
    "polling": (_polling, "resident size every 10 ms"),
    "ru_maxrss": (_maxrss, "as asv's peakmem: the whole process"),
    "tracemalloc": (_tracemalloc, "sees Python's own allocations alone"),
}
TOOLS = tuple(METERS)
