"""What a token costs after a context: flat and linear are told apart, and neither is claimed without grounds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
from sympy import Integer, Min

from ctxbench.analysis.carried import carried, columns, growth, verdict
from ctxbench.analysis.scaling import Slope
from ctxbench.cell import Cell
from ctxbench.cost import Cost
from ctxbench.cost.symbols import T
from ctxbench.method import Impl, Method
from ctxbench.registry import Entry, Registry
from ctxbench.rows import Flops, Latency, PeakBytes, Row, StateBytes, row_for

LENGTHS = (1024, 8192, 32768, 131072)


def run(
    mode: str, seconds: Callable[[int], float], kept: Callable[[int], int], noise: float = 0.02, processes: int = 3
) -> list[Row]:
    draw = random.Random(7)
    rows = []
    for length in LENGTHS:
        samples = [[seconds(length) * draw.gauss(1, noise)] * 3 for _ in range(processes)]
        medians = sorted(process[0] for process in samples)
        latency = Latency(
            median=medians[len(medians) // 2], low=medians[0], high=medians[-1], samples=samples, n_processes=processes
        )
        rows.append(
            row_for(
                Cell(method="m", impl="blocked", mode=mode, seq_len=length), "ok", latency_s=latency,
                flops=Flops(formula=10**6), state_bytes=StateBytes(measured=kept(length), formula=1),
                peak_bytes=PeakBytes(allocated=kept(length) + 64),
            )
        )  # fmt: skip
    return rows


def test_a_bounded_state_is_flat_in_time_and_bytes() -> None:
    (found,) = carried(run("decode", lambda n: 4e-4, lambda n: 1 << 20))
    assert found.time_text.startswith("flat: T^")
    assert (found.state_text, found.peak_text) == ("flat", "flat")
    assert found.lengths == list(LENGTHS)
    assert found.token_s == pytest.approx([4e-4] * 4, rel=0.1)


def test_a_cache_of_all_tokens_is_linear() -> None:
    (found,) = carried(run("decode", lambda n: 1e-7 * n, lambda n: 512 * n))
    assert found.time_text.startswith("linear: T^")
    assert found.state_text == "linear"


def test_a_stream_is_judged_by_the_token_and_not_by_the_call() -> None:
    (found,) = carried(run("stream", lambda n: 1e-6 * n, lambda n: 1 << 20))
    assert found.time_text.startswith("flat")
    assert found.token_s == pytest.approx([1e-6] * 4, rel=0.1)
    (found,) = carried(run("stream", lambda n: 1e-9 * n * n, lambda n: n))
    assert found.time_text.startswith("linear")
    assert found.time.formula == pytest.approx(-1)  # 10**6 FLOPs a call at every length


def test_a_memory_that_fills_is_flat_from_where_it_is_full() -> None:
    (found,) = carried(run("decode", lambda n: 4e-4, lambda n: min(n, 8192) * 8))
    assert found.state_text == "flat from 8k"


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [(0.0, -0.1, 0.1, "flat"), (0.0, -0.6, 0.6, ""), (1.0, 0.9, 1.15, "linear"), (0.3, 0.25, 0.35, ""),
     (-0.1, -0.4, 0.1, "flat"), (-0.5, -0.6, -0.4, ""),
     (0.05, None, None, "flat"), (1.5, 1.4, 1.6, "")],
)  # fmt: skip
def test_a_word_is_said_only_where_the_whole_interval_allows_it(value, low, high, word) -> None:
    assert verdict(Slope(first=1, last=2, value=value, low=low, high=high)) == word


def test_scatter_withholds_the_word() -> None:
    (found,) = carried(run("decode", lambda n: 4e-4, lambda n: 1, noise=0.8))
    assert found.time_text.startswith("T^")


def test_growth_of_counts_needs_two_of_them() -> None:
    assert growth([1, 2], [None, 5]) == ""
    assert growth([1, 2, 4], [None, 5, 5]) == "flat"
    assert growth([1024, 2048], [10, 20]) == "linear"
    assert growth([1024, 2048], [10, 40]) == "T^2.00"
    assert growth([1024, 2048], [0, 40]) == ""


def test_other_modes_and_single_lengths_have_no_part() -> None:
    rows = run("forward", lambda n: 1.0, lambda n: 1)
    assert carried(rows) == []
    assert carried(run("decode", lambda n: 1.0, lambda n: 1)[:1]) == []


def test_a_table_has_at_most_four_lengths_its_ends_among_them() -> None:
    (found,) = carried(run("decode", lambda n: 1.0, lambda n: 1))
    assert columns([found]) == list(LENGTHS)
    assert columns([found], most=2) == [1024, 131072]


def test_a_memory_longer_than_the_measured_lengths_is_bounded_in_the_end() -> None:
    rows = run("decode", lambda n: 4e-4, lambda n: n)
    cost = Cost({}, {"map": T}, Integer(1), state_bytes=Min(T, 10**9))
    method = Method("m", build=lambda *_: None, impls=(Impl("blocked"),), cost=lambda *_: cost)
    (found,) = carried(rows, Registry({"m": Entry(method, "here", "here")}, []))
    assert found.state_text == "linear, in the end O(1)"
    broken = dataclasses.replace(method, cost=lambda *_: 1 / 0)
    assert carried(rows, Registry({"m": Entry(broken, "here", "here")}, []))[0].state_text == "linear"
