"""``python -m ctxbench.suites.scorecard.truth COUNT``: medians of plain loops, COUNT fresh processes a cell, as JSON.

Apart from the harness: a process forked from one that has imported torch builds the call, warms it up and reads a clock
around each of at least LEAST calls. Processes of different cells take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

from ctxbench.suites.scorecard.work import CELLS, call

LEAST, SECONDS, WARM_UP = 10, 0.4, 3


def loop(index: int) -> float:
    """Median seconds of a call of one cell in this process."""
    work = call(index)
    for _ in range(WARM_UP):
        work()
    seconds: list[float] = []
    while len(seconds) < LEAST or sum(seconds) < SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def forked(index: int) -> float:
    """The same in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, repr(loop(index)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return float(text)


if __name__ == "__main__":
    import torch  # once, before the forks

    torch.set_num_threads(1)
    turns = [[forked(index) for index in range(len(CELLS))] for _ in range(int(sys.argv[1]))]
    sys.stdout.write(json.dumps([list(cell) for cell in zip(*turns, strict=True)]) + "\n")
