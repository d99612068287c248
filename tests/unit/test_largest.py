"""The largest values of rows, in C++, against a stable sort."""

from __future__ import annotations

import math

import pytest
import torch

from ctxbench.implementations._shared.largest import largest_

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SHAPES = [(5, 1), (5, 5), (33, 32), (64, 64), (100, 99), (1000, 7), (1001, 500), (8192, 32), (8191, 1), (4100, 513)]


def rows(kind: str, width: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width * 1000 + count)
    values = torch.randn(6, width, generator=generator, dtype=torch.float64)
    if kind == "ties":
        return (2 * values).round()
    if kind == "equal":
        return torch.full_like(values, -3.0)
    if kind == "rising":
        return values.sort(dim=1).values
    if kind == "hidden":  # fewer numbers than are wanted: minus infinity is taken too
        values[:, torch.randperm(width, generator=generator)[: width - count // 2]] = -math.inf
    if kind == "zeros":  # of both signs, and equal
        return torch.where(values > 0, 0.0, -0.0)
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising", "hidden", "zeros"])
def test_rows_give_what_a_stable_sort_gives(kind: str, dtype: torch.dtype) -> None:
    for width, count in SHAPES:
        values = rows(kind, width, count).to(dtype)
        found, columns = values.new_empty(6, count), torch.empty(6, count, dtype=torch.int32)
        largest_(values, found, columns)
        order = values.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(columns.long(), order[:, :count].sort(dim=1).values), (width, count)
        assert torch.equal(found, values.gather(1, columns.long()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_either_sign_is_the_largest_and_infinity_the_next(dtype: torch.dtype) -> None:
    values = torch.randn(3, 300).to(dtype)
    nan = torch.tensor(math.nan, dtype=dtype)
    values[:, 17], values[:, 250] = nan, nan.copysign(torch.tensor(-1.0, dtype=dtype))
    values[:, 100], values[:, 200] = math.inf, -math.inf
    found, columns = values.new_empty(3, 3), torch.empty(3, 3, dtype=torch.int32)
    largest_(values, found, columns)
    assert columns.tolist() == [[17, 100, 250]] * 3
    assert found.isnan().sum() == 6


def test_rows_may_lie_apart_and_every_thread_counts_the_same() -> None:
    values = torch.randn(70, 900)[:, 3:803]
    found, columns = values.new_empty(70, 20), torch.empty(70, 20, dtype=torch.int32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            largest_(values, found, columns)
            assert torch.equal(found.sort(dim=1).values, values.sort(dim=1).values[:, -20:])
            assert torch.equal(found, values.gather(1, columns.long()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("values", "found", "columns", "said"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int32), "received 5 of 4"),
        (torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 2), "int32 columns"),
        (torch.zeros(4, 2).T, torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int32), "one piece"),
        (torch.zeros(2, 4), torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int32), "results of 2 rows"),
    ],
)
def test_what_does_not_fit_is_refused(
    values: torch.Tensor, found: torch.Tensor, columns: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        largest_(values, found, columns)
