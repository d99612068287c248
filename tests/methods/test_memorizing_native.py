"""What the search in C++ picks, against a stable sort, and what it makes of it."""

from __future__ import annotations

import math

import pytest
import torch

from ctxbench.implementations.memorizing import native, reference

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


def picked(scores: torch.Tensor, count: int, most: int | None = None, queries: int = 1) -> torch.Tensor:
    """Columns of ``scores: [heads, m]``, each the channel of a key that queries, all 1, meet: ``[heads, count]``."""
    k = scores[None, :, :, None]
    q = torch.ones_like(k[:, :, :1]).repeat(1, 1, queries, 1)
    weights, m = k.new_empty(len(scores), queries, count), scores.shape[1]
    chosen = torch.empty_like(weights, dtype=torch.int32)
    native.retrieve(q, k, torch.zeros_like(k), m, queries, most or m, count, torch.empty_like(q), weights, chosen)
    assert torch.equal(chosen, chosen[:, :1].expand_as(chosen))
    shares = scores.gather(1, chosen[:, 0].long()).to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=1)
    torch.testing.assert_close(weights[:, 0], shares.to(scores.dtype), equal_nan=True, rtol=1e-2, atol=1e-6)
    return chosen[:, 0].long()


@pytest.mark.parametrize("queries", [1, 6])  # keys where they lie, and packed
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising", "hidden", "zeros"])
def test_rows_give_what_a_stable_sort_gives(kind: str, dtype: torch.dtype, queries: int) -> None:
    for width, count in SHAPES:
        values = rows(kind, width, count).to(dtype)
        order = values.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(picked(values, count, None, queries), order[:, :count].sort(dim=1).values), (width, count)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "hidden"])
def test_a_memory_may_begin_inside_a_panel_of_keys(kind: str, queries: int) -> None:
    values = rows(kind, 333, 9)
    for most in (10, 63, 64, 65, 190, 332):
        order = values[:, -most:].sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(picked(values, 9, most, queries), order[:, :9].sort(dim=1).values + 333 - most), most


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_either_sign_is_the_largest_and_infinity_the_next(dtype: torch.dtype, queries: int) -> None:
    values = torch.randn(3, 300).to(dtype)
    nan = torch.tensor(math.nan, dtype=dtype)
    values[:, 17], values[:, 250] = nan, nan.copysign(torch.tensor(-1.0, dtype=dtype))
    values[:, 100], values[:, 200] = math.inf, -math.inf
    assert picked(values, 3, None, queries).tolist() == [[17, 100, 250]] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 16, 40])
def test_a_sequence_finds_what_its_segments_find_one_by_one(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    q, k, v = (torch.randn(2, 430, 3, width, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    exact = torch.float64
    for top_k, segment, memory in ((5, 33, 150), (40, 33, 150), (1, 430, 64), (3, 100, 1000)):
        found = native.whole(q, k, v, top_k, segment, memory)
        for begin in range(0, 430, segment):
            part, seen = slice(begin, begin + segment), slice(max(0, begin - memory), begin)
            expected = torch.zeros_like(q[:, :, part], dtype=exact)
            if begin:
                expected = reference.lookup(
                    *(x.to(exact) for x in (q[:, :, part], k[:, :, seen], v[:, :, seen])), top_k
                )
            error = (found[:, :, part].to(exact) - expected).abs()
            assert error.median() <= 4 * torch.finfo(dtype).eps, (top_k, segment, begin)
            if dtype is exact:
                assert error.max() < 1e-12


def test_every_number_of_threads_finds_the_same() -> None:
    q, k, v = (torch.randn(1, 2, 200, 8) for _ in range(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(native.whole(q, k, v, 5, 30, 90))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_cannot_be_picked_is_refused() -> None:
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8)
    for known, segment, most, top_k in ((6, 4, 6, 7), (6, 4, 3, 4), (7, 4, 7, 2), (0, 2, 6, 3), (6, 2, 6, 2)):
        with pytest.raises(ValueError, match="before the first of"):
            native.retrieve(q, k, k, known, segment, most, top_k, torch.empty_like(q))
