"""The reference kernels: a change of speed is seen, with its sign, and an unchanged machine is not accused."""

from __future__ import annotations

import pytest

from ctxbench.measure import drift
from ctxbench.measure.drift import Pair


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (Pair(1.0, 2.0), {}),
        (Pair(1.04, 2.5), {}),
        (Pair(1.2, 2.0), {"products": 0.2}),
        (Pair(1.01, 1.2), {"copies": -0.4}),
        (Pair(0.5, 3.0), {"products": -0.5, "copies": 0.5}),
    ],
    ids=["unchanged", "within the limits", "slower arithmetic", "faster memory", "both"],
)
def test_changes_beyond_the_limits_are_named_with_their_sign(after: Pair, expected: dict[str, float]) -> None:
    seen = drift.between(Pair(1.0, 2.0), after)
    assert seen["drift"] == pytest.approx(expected)
    assert seen["reference_matmul_s"] == [1.0, after.matmul_s]
    assert seen["reference_copy_s"] == [2.0, after.copy_s]


def test_a_beat_takes_time_on_a_cpu_and_there_is_none_on_a_gpu() -> None:
    beat = drift.beat("cpu")
    assert beat is not None
    assert min(beat(), beat()) > 0
    assert drift.beat("cuda:0") is None


def test_both_kernels_take_time() -> None:
    pair = drift.reference_pair("cpu")
    assert pair.matmul_s > 0
    assert pair.copy_s > 0
