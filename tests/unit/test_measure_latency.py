"""The rules of warming up and stopping, on a clock that the test winds."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ctxbench.measure import latency
from ctxbench.run.tasks import Protocol

PROTOCOL = Protocol(precision=0.02, min_samples=10, sample_budget_s=0.5, sample_cap_s=15.0)


def clock(durations: Iterator[float]) -> latency.Stopwatch:
    """A stopwatch that reads planted durations; CPU time is twice the wall time."""

    def time(call: Callable[[], Any]) -> tuple[float, float, Any]:
        wall = next(durations)
        return wall, 2 * wall, call()

    return time


def constant(seconds: float) -> Iterator[float]:
    while True:
        yield seconds


def alternating(seconds: float, spread: float) -> Iterator[float]:
    while True:
        yield seconds * (1 - spread)
        yield seconds * (1 + spread)


def measured(durations: Iterator[float], protocol: Protocol = PROTOCOL) -> latency.Timing:
    return latency.measure(lambda: None, protocol, clock(durations))


@pytest.mark.parametrize(("seconds", "least"), [(0.001, 10), (0.3, 5), (2.0, 3), (6.0, 1)], ids=str)
def test_a_quiet_call_stops_at_the_least_number_of_samples(seconds: float, least: int):
    timing = measured(constant(seconds))
    assert len(timing.samples) in (least, least + 1)
    assert timing.stop in (("n=1", "budget") if least == 1 else ("precision", "budget"))


def test_a_quiet_short_call_stops_for_precision():
    timing = measured(constant(0.001))
    assert timing.stop == "precision"
    assert timing.cpu == [2 * sample for sample in timing.samples]


def test_a_wide_spread_runs_until_the_budget_is_spent():
    timing = measured(alternating(0.02, 0.5))
    assert timing.stop == "budget"
    assert 0.5 <= sum(timing.samples) <= 0.5 + 0.03


def test_noise_that_no_longer_changes_stops_sampling():
    generous = Protocol(precision=1e-6, min_samples=10, sample_budget_s=60.0, sample_cap_s=60.0)
    timing = measured(alternating(0.001, 0.3), generous)
    assert timing.stop == "noise settled"
    assert latency.NOISE_LEAST < len(timing.samples) < 600


def test_the_cap_ends_sampling_below_the_least_number():
    timing = measured(constant(4.0), Protocol(min_samples=10, sample_budget_s=60.0, sample_cap_s=7.0))
    assert timing.stop == "cap"
    assert len(timing.samples) == 2


def test_a_call_of_more_than_twenty_seconds_is_made_once():
    timing = measured(constant(25.0))
    assert (timing.samples, timing.warmup, timing.stop) == ([25.0], [], "n=1")


def test_a_call_of_more_than_five_seconds_is_warmed_up_once_and_sampled_once():
    timing = measured(constant(8.0))
    assert (timing.samples, timing.warmup, timing.stop) == ([8.0], [8.0], "n=1")


def test_the_warm_up_is_kept_apart_and_lasts_until_calls_settle():
    def settling() -> Iterator[float]:
        yield 0.5
        for index in range(8):
            yield 0.006 * (1.5 - index / 10)
        yield from constant(0.004)

    timing = measured(settling())
    assert timing.warmup[0] == 0.5
    assert len(timing.warmup) >= 6
    assert max(timing.samples) < 0.5


@pytest.mark.parametrize(("seconds", "least_s"), [(0.0005, 0.025), (0.005, 0.025)], ids=str)
def test_short_calls_are_warmed_up_for_some_time(seconds: float, least_s: float):
    timing = measured(constant(seconds))
    assert sum(timing.warmup) >= least_s
    assert len(timing.warmup) >= 2


def test_a_drifting_call_is_not_steady():
    def slowing() -> Iterator[float]:
        seconds = 0.02
        while True:
            yield seconds
            seconds *= 1.05

    assert not measured(slowing()).steady
    assert measured(alternating(0.02, 0.1)).steady


def test_every_result_is_consumed_once_and_in_order():
    calls, consumed = iter(range(10**6)), []
    timing = latency.measure(lambda: next(calls), PROTOCOL, clock(constant(0.01)), consumed.append)
    assert consumed == list(range(len(timing.warmup) + len(timing.samples)))


@pytest.mark.parametrize(("seconds", "every"), [(0.001, 25), (0.02, 2), (0.06, 1)], ids=str)
def test_the_reference_runs_between_samples_for_a_tenth_of_their_time(seconds: float, every: int):
    asked: list[float] = []
    timing = latency.measure(
        lambda: None, PROTOCOL, clock(alternating(seconds, 0.3)), reference=lambda: asked.append(0.002) or 0.002
    )
    taken = [count for count, _ in timing.beats]
    assert (taken[0], taken[-1]) == (0, len(timing.samples))
    assert set(itertools.pairwise(taken[:-1])) <= {(n, n + k) for n in taken for k in (every - 1, every, every + 1)}
    assert all(beat == pytest.approx(0.002) for _, beat in timing.beats)
    assert 0.05 <= sum(asked) / sum(timing.samples) <= 0.15
    assert measured(constant(0.001)).beats == []


@pytest.mark.parametrize(("seconds", "again"), [(0.004, True), (0.02, False)], ids=str)
def test_no_sample_of_a_short_call_is_the_first_after_the_reference(seconds: float, again: bool):
    order: list[str] = []

    def clocked(call: Callable[[], Any]) -> tuple[float, float, Any]:
        order.append("call")
        return (1.5 if order[-2:] == ["reference", "call"] else 1.0) * seconds, seconds, call()

    timing = latency.measure(
        lambda: None, PROTOCOL, clocked, reference=lambda: order.append("reference") or 0.1 * seconds
    )
    assert len(timing.beats) >= 3
    assert (max(timing.samples) == seconds) is again
    assert timing.warmup.count(1.5 * seconds) == (len(timing.beats) - 1 if again else 0)
    assert order.count("call") == len(timing.samples) + len(timing.warmup)


def test_the_reference_costs_no_more_than_its_most_beside_long_calls():
    asked: list[float] = []
    timing = latency.measure(
        lambda: None, PROTOCOL, clock(constant(3.0)), reference=lambda: asked.append(0.002) or 0.002
    )
    assert len(timing.beats) == len(timing.samples) + 1
    assert sum(asked) <= 0.002 + len(timing.samples) * (latency.BEAT_MOST_S + 0.002)


def test_the_clock_costs_less_than_a_microsecond_a_call():
    durations = sorted(latency.cpu_stopwatch(lambda: None)[0] for _ in range(2000))
    assert durations[len(durations) // 2] < 1e-6


class FakeCuda:
    """Remembers what was asked of the device; every event is two milliseconds after the one before."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def Event(self, enable_timing: bool) -> "FakeCuda.Mark":  # as torch names it
        assert enable_timing
        return FakeCuda.Mark(self)

    class Mark:
        def __init__(self, cuda: "FakeCuda"):
            self.cuda, self.at = cuda, math.nan

        def record(self) -> None:
            self.cuda.log.append("record")
            self.at = 2.0 * len([entry for entry in self.cuda.log if entry == "record"])

        def elapsed_time(self, end: "FakeCuda.Mark") -> float:
            return end.at - self.at


def test_cuda_time_lies_between_two_events_after_a_flush():
    cuda = FakeCuda()
    stopwatch = latency.CudaStopwatch(cuda, lambda: cuda.log.append("flush"))
    seconds, _, result = stopwatch(lambda: cuda.log.append("call") or "y")
    assert cuda.log == ["flush", "synchronize", "record", "call", "record", "synchronize"]
    assert seconds == pytest.approx(0.002)
    assert result == "y"
    assert len(stopwatch.wall) == 1


def test_samples_of_a_throttled_device_are_discarded_and_paused_for(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(latency.time, "sleep", pauses.append)
    answers = iter([False, True, True, False])
    timing = latency.measure(lambda: None, PROTOCOL, clock(constant(0.001)), slow=lambda: next(answers, False))
    assert (timing.discarded, timing.throttled, pauses) == (2, False, [0.05, 0.05])


def test_a_device_that_stays_throttled_is_measured_with_a_mark(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(latency.time, "sleep", pauses.append)
    timing = latency.measure(lambda: None, PROTOCOL, clock(constant(0.001)), slow=lambda: True)
    assert timing.throttled
    assert len(timing.samples) >= PROTOCOL.min_samples
    assert timing.discarded <= len(timing.samples) + 1
    assert pauses[:4] == pytest.approx([0.05, 0.05, 0.125, 0.3125])
    assert max(late - early for early, late in itertools.pairwise(pauses)) <= 0.5 + 1e-9
