"""Byte-exact peak of torch's CPU allocator: the allocator's own events, kernel temporaries included.

Two profilers of torch report those events. The light one starts in microseconds but has no public name; it is used
where a known allocation is seen exactly, else the public one (about a second at its first use in a process). Both
follow the thread that started them, the threads of its parallel loops and of its backward pass, and no others: memory
taken by a thread that a module starts itself is seen by the resident meter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

Event = tuple[float, int]  # moment, bytes (negative: freed)


def peak(events: Iterable[Event]) -> int:
    """Most bytes alive at once above the start; events of several threads may come in any order."""
    alive = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        alive += size
        most = max(most, alive)
    return most


def measure(call: Callable[[], Any]) -> tuple[int, str]:
    """Peak bytes above the start of one call, and the name of the meter that saw them."""
    if _light_works():
        return peak(_light(call)), "allocator events"
    return peak(_public(call)), "profiler events"


def merge(threads: Sequence[Sequence[Any]]) -> list[Event]:
    """Allocation events of all threads' lists, each with its time since the first event of the first list."""
    origin = next(event for events in threads for event in events)
    return [
        (origin.cpu_elapsed_us(event), event.cpu_memory_usage())
        for events in threads
        for event in events
        if event.kind() == "memory_alloc" and event.cpu_memory_usage()
    ]


@lru_cache(maxsize=1)
def _light_works() -> bool:
    """Whether the light profiler exists in this torch and sees 3 MiB where 2 MiB, then 1 MiB more are taken."""

    def take() -> None:
        first = torch.empty(2**21, dtype=torch.uint8)
        second = torch.empty(2**20, dtype=torch.uint8)
        del first, second
        torch.empty(2**20, dtype=torch.uint8)

    try:
        return peak(_light(take)) == 3 * 2**20
    except (AttributeError, TypeError, RuntimeError, StopIteration):
        return False


def _light(call: Callable[[], Any]) -> list[Event]:
    autograd: Any = torch.autograd
    config = autograd.ProfilerConfig(
        autograd.ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )  # shapes off, memory on, stacks, FLOPs and modules off
    autograd._enable_profiler_legacy(config)
    try:
        autograd._enable_record_function(False)  # operators are of no interest, and their record took 30 MiB
        result = call()
    finally:
        autograd._enable_record_function(True)
        threads = autograd._disable_profiler_legacy()
    del result
    return merge(threads)


def _public(call: Callable[[], Any]) -> list[Event]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    inner: Any = profiler.profiler
    events = inner.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
