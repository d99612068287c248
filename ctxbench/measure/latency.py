"""Seconds a call: warm-up, adaptive sampling, and the reason sampling stopped. Every sample is kept.

One process is measured here; ``statistics.summarise`` puts several together. The clock is a *stopwatch*: a callable
that runs a call and returns ``(wall seconds, process CPU seconds, result)``, so that tests bring a fake one.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ctxbench.measure.statistics import half_width
from ctxbench.run.tasks import Protocol

Call = Callable[[], Any]
Stopwatch = Callable[[Call], tuple[float, float, Any]]
Sample = tuple[float, float, int]  # wall seconds, process CPU seconds, page faults

WARM_UP = ((1e-3, 0.025), (1e-2, 1.0), (math.inf, 3.0))  # a call of at most .. seconds is warmed up for .. seconds
ENOUGH_CALLS = ((0.1, 2), (0.01, 3))  # calls longer than .. seconds are warm after .. of them
ONE_SAMPLE_S = 5.0  # above this, one sample is allowed
NO_WARM_UP_S = 20.0  # above this, the first call is the sample
WARM_UP_AGREES = 0.05  # two successive medians of three warm-up calls
SETTLED = 0.05  # spread of the noise estimates, relative to their mean
NOISE_RING, NOISE_LEAST, NOISE_EVERY = 512, 64, 16
PAUSE_S, PAUSE_GROWS_AFTER, PAUSE_GROWTH, PAUSE_STEP_S = 0.05, 3, 1.5, 0.5  # for a device whose clock fell
BEAT_EVERY_S, BEAT_SHARE, BEAT_MOST_S = 0.025, 0.1, 0.03  # the reference between samples: a tenth of their time
COLD_BELOW_S = 0.0125  # the reference takes the caches: the next call is 0.1 to 0.3 ms slower, of longer ones under 2 %
STEADY = 0.02  # both halves of the samples agree within this, or within what their own spread explains


@dataclass
class Timing:
    """What one process measured; durations in seconds, ``faults_per_call`` in page faults.

    ``beats`` are the reference between the samples: how many of them preceded it, and its mean seconds there and then.
    """

    samples: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    warmup: list[float] = field(default_factory=list)
    stop: str = ""
    steady: bool = True
    faults_per_call: float = 0.0
    discarded: int = 0  # samples taken while the clock of the device was low
    throttled: bool = False  # such samples are among those that were kept
    beats: list[tuple[int, float]] = field(default_factory=list)


def cpu_stopwatch(call: Call) -> tuple[float, float, Any]:
    """Wall and process CPU time of one call; less than 0.2 us of it is the clock's own."""
    cpu = time.process_time_ns()
    start = time.perf_counter_ns()
    result = call()
    end = time.perf_counter_ns()
    return (end - start) * 1e-9, (time.process_time_ns() - cpu) * 1e-9, result


class CudaStopwatch:
    """Device time between two events, the level-2 cache flushed before each call; ``wall`` keeps time with launch.

    Args:
        cuda: ``torch.cuda``.
        flush: fills the cache with something else; called before every call, outside the measured interval.
    """

    def __init__(self, cuda: Any, flush: Call):
        self.cuda, self.flush = cuda, flush
        self.wall: list[float] = []

    def __call__(self, call: Call) -> tuple[float, float, Any]:
        before, after = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        self.flush()
        self.cuda.synchronize()
        cpu, start = time.process_time_ns(), time.perf_counter_ns()
        before.record()
        result = call()
        after.record()
        self.cuda.synchronize()
        self.wall.append((time.perf_counter_ns() - start) * 1e-9)
        return before.elapsed_time(after) * 1e-3, (time.process_time_ns() - cpu) * 1e-9, result


def stopwatch_for(device: str) -> Stopwatch:
    """The stopwatch of a device; on CUDA the flushed buffer has exactly the size of the level-2 cache."""
    if not device.startswith("cuda"):
        return cpu_stopwatch
    import torch

    size = torch.cuda.get_device_properties(device).L2_cache_size
    return CudaStopwatch(torch.cuda, torch.empty(size, dtype=torch.int8, device=device).zero_)


def _ignore(_: Any) -> None:
    """Consume a result whose values nobody checks."""


def _never() -> bool:
    """The clock of a CPU cannot be asked."""
    return False


def measure(
    call: Call,
    protocol: Protocol,
    stopwatch: Stopwatch = cpu_stopwatch,
    consume: Callable[[Any], None] = _ignore,
    slow: Callable[[], bool] = _never,
    reference: Callable[[], float] | None = None,
) -> Timing:
    """Warm up, then sample until the median is known well enough or the time is spent.

    Args:
        call: what is timed.
        protocol: precision, least number of samples, budget and cap.
        stopwatch: runs one call and times it.
        consume: is given every result outside the timed interval; the result is dropped after it returns.
        slow: asked after every sample whether the clock of the device has fallen. Such a sample is discarded and the
            device given a pause, unless as many were discarded as kept: then it stays and the timing is marked.
        reference: does a fixed piece of work and returns its seconds. It is called before the first sample, after the
            last and now and then between them: where nothing else tells how fast the machine is, this does.
    """
    timing = Timing()

    def once() -> Sample:
        before = _faults()
        wall, cpu, result = stopwatch(call)
        faults = _faults() - before
        consume(result)
        return wall, cpu, faults

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        first, cpu, faults = once()
        timing.warmup.append(first)
        if first > NO_WARM_UP_S:
            return Timing([first], [cpu], [], "n=1", faults_per_call=faults)
        _warm_up(once, timing.warmup)
        _sample(once, protocol, timing, slow, _Beat(reference, once, timing))
        timing.steady = _is_steady(timing.samples)
    finally:
        if collecting:
            gc.enable()
    return timing


def _warm_up(once: Callable[[], Sample], times: list[float]) -> None:
    """Call until two successive medians agree, but no longer than the band of the call's length says."""
    while times[0] <= ONE_SAMPLE_S:
        typical, spent = min(times), sum(times)
        if len(times) >= 2:
            if spent >= next(seconds for length, seconds in WARM_UP if typical <= length):
                return
            if any(typical > length and len(times) >= count for length, count in ENOUGH_CALLS):
                return
            if len(times) >= 6 and spent >= WARM_UP[0][1]:
                early, late = float(np.median(times[-6:-3])), float(np.median(times[-3:]))
                if abs(late - early) <= WARM_UP_AGREES * late:
                    return
        times.append(once()[0])


def _sample(
    once: Callable[[], Sample], protocol: Protocol, timing: Timing, slow: Callable[[], bool], beat: _Beat
) -> None:  # fmt: skip
    spent, faults, check_at, in_a_row, pause = 0.0, 0, 1, 0, PAUSE_S
    noise = _Noise()
    beat(0.0)
    while not timing.stop:
        wall, cpu, faulted = once()
        in_a_row = in_a_row + 1 if slow() else 0
        if in_a_row and timing.discarded <= len(timing.samples):
            timing.discarded += 1
            if in_a_row > PAUSE_GROWS_AFTER:
                pause += min(PAUSE_GROWTH * pause, PAUSE_STEP_S)
            time.sleep(pause)
            continue
        timing.throttled |= in_a_row > 0
        timing.samples.append(wall)
        timing.cpu.append(cpu)
        faults += faulted
        spent += wall
        noise.add(wall)
        count = len(timing.samples)
        if spent >= protocol.sample_cap_s:
            timing.stop = "n=1" if count == 1 else "cap"
        elif count >= _least(spent / count, protocol):
            # Sorting all samples after each one would cost more than short calls: look after every 5 % more.
            if count >= check_at:
                check_at = count + 1 + count // 20
                if half_width(timing.samples) <= protocol.precision:
                    timing.stop = "precision"
            if not timing.stop and noise.settled():
                timing.stop = "noise settled"
            if not timing.stop and spent >= protocol.sample_budget_s:
                timing.stop = "n=1" if count == 1 else "budget"
        beat(wall, last=bool(timing.stop))
    timing.faults_per_call = faults / len(timing.samples)


def _least(call_s: float, protocol: Protocol) -> int:
    """Fewest samples of a call of this length."""
    for length, count in ((0.1, protocol.min_samples), (1.0, 5), (ONE_SAMPLE_S, 3)):
        if call_s < length:
            return min(count, protocol.min_samples)
    return 1


class _Beat:
    """Times the reference between samples, about once in ``BEAT_EVERY_S`` and for ``BEAT_SHARE`` of their time.

    A short call is then made once more for the caches; it belongs to the warm-up.
    """

    def __init__(self, reference: Callable[[], float] | None, once: Callable[[], Sample], timing: Timing):
        self.reference, self.once, self.timing, self.since = reference, once, timing, 0.0

    def __call__(self, wall: float, last: bool = False) -> None:
        samples, beats = self.timing.samples, self.timing.beats
        self.since += wall
        if self.reference is None or (samples and self.since < BEAT_EVERY_S and not last):
            return
        wanted, times = min(BEAT_SHARE * self.since, BEAT_MOST_S), [self.reference()]
        while sum(times) + times[-1] / 2 < wanted:
            times.append(self.reference())
        beats.append((len(samples), sum(times) / len(times)))
        self.since = 0.0
        if not last and (wall or min(self.timing.warmup)) < COLD_BELOW_S:
            self.timing.warmup.append(self.once()[0])


class _Noise:
    """Running relative standard deviation; *settled* once its own recent values hardly vary."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.recent: deque[float] = deque(maxlen=NOISE_RING)

    def add(self, sample: float) -> None:
        self.count += 1
        step = sample - self.mean
        self.mean += step / self.count
        self.squares += step * (sample - self.mean)
        if self.count > 1 and self.mean > 0:
            self.recent.append(math.sqrt(self.squares / (self.count - 1)) / self.mean)

    def settled(self) -> bool:
        if len(self.recent) < NOISE_LEAST or self.count % NOISE_EVERY:
            return False
        recent = np.array(self.recent)
        return bool(recent.std() < SETTLED * recent.mean())


def _is_steady(samples: list[float]) -> bool:
    """Whether the second half of the samples has the median of the first, as far as their spread can tell."""
    half = len(samples) // 2
    if half < 2:
        return True
    early, late = samples[:half], samples[half:]
    middle = float(np.median(samples))
    gap = abs(float(np.median(late)) - float(np.median(early)))
    return gap <= max(STEADY, half_width(early) + half_width(late)) * middle


def _faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt
