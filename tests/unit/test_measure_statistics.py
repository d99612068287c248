"""Numbers from samples: answers that can be worked out by hand."""

import math

import numpy as np
import pytest

from ctxbench.measure import statistics
from ctxbench.run.tasks import Samples


def process(*samples: float, **fields: object) -> Samples:
    return Samples(samples=list(samples), cpu=[2 * sample for sample in samples], **fields)


def test_the_median_is_taken_of_process_medians_not_of_pooled_samples():
    processes = [process(1.0, 1.0, 1.0, 1.0, 1.0), process(3.0), process(5.0)]
    latency, _ = statistics.summarise(processes, 0.02)
    assert latency.median == 3.0
    assert latency.cpu_median == 6.0
    assert latency.n_processes == 3
    assert latency.samples == [[1.0] * 5, [3.0], [5.0]]


def test_fewer_than_five_processes_give_their_range():
    latency, reached = statistics.summarise([process(1.0), process(2.0), process(1.5)], 0.02)
    assert (latency.low, latency.high) == (1.0, 2.0)
    assert not reached


def test_precision_is_reached_when_half_the_interval_is_small_enough():
    processes = [process(1.00, 1.00), process(1.01, 1.01), process(1.02, 1.02)]
    assert statistics.summarise(processes, 0.02)[1]
    assert not statistics.summarise(processes, 0.005)[1]


def test_one_sample_never_reaches_a_precision():
    latency, reached = statistics.summarise([process(2.0)], 0.5)
    assert (latency.median, latency.low, latency.high) == (2.0, 2.0, 2.0)
    assert not reached


def test_no_sample_at_all_is_refused():
    with pytest.raises(ValueError, match="no process"):
        statistics.summarise([process()], 0.02)


def test_the_bootstrap_covers_the_true_median_about_as_often_as_it_says():
    draw = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        low, high = statistics.interval(draw.normal(10.0, 1.0, 20).tolist())
        hits += low <= 10.0 <= high
    assert 0.88 <= hits / 200 <= 1.0


def test_the_bootstrap_gives_the_same_interval_every_time():
    medians = [1.0, 1.1, 0.9, 1.2, 1.05, 0.95]
    assert statistics.interval(medians) == statistics.interval(medians)


@pytest.mark.parametrize(
    ("count", "ranks"), [(1, (1, 1)), (5, (1, 5)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))], ids=str
)
def test_the_median_of_one_process_is_bounded_by_ranks(count: int, ranks: tuple[int, int]):
    low, high = statistics.median_interval([float(rank) for rank in range(1, count + 1)])
    assert low == pytest.approx(ranks[0], abs=1)
    assert high == pytest.approx(ranks[1], abs=1)


def test_outliers_are_counted():
    assert statistics.outliers([1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 5.0]) == 1
    assert statistics.outliers([1.0, 1.1, 0.9]) == 0


def test_the_robust_spread_ignores_one_wild_sample():
    calm = [0.9, 0.95, 1.0, 1.05, 1.1]
    assert statistics.robust_cv([*calm, 1000.0]) < 0.2
    assert statistics.robust_cv([2.0, 2.0, 2.0]) == 0.0


def test_half_a_single_sample_is_unknown():
    assert statistics.half_width([1.0]) == math.inf


def test_two_modes_are_told_from_one():
    draw = np.random.default_rng(3)
    one = draw.normal(1.0, 0.02, 40).tolist()
    two = [*draw.normal(1.0, 0.02, 30), *draw.normal(2.0, 0.02, 10)]
    assert statistics.is_bimodal(two)
    assert not statistics.is_bimodal(one)
    assert not statistics.is_bimodal([*one, 3.0])
