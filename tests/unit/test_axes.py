"""The size grammar."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench.axes import GRAMMAR, parse_size, parse_sizes
from ctxbench.errors import UserError
from ctxbench.units import format_tokens

SIZES = st.integers(1, 2**20)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4k", (4096,)),
        ("1m", (2**20,)),
        ("1K..8k", (1024, 2048, 4096, 8192)),
        ("1k..7k", (1024, 2048, 4096)),
        ("1k..64k*4", (1024, 4096, 16384, 65536)),
        ("1k..4k+1k", (1024, 2048, 3072, 4096)),
        ("1k,3k, 10k", (1024, 3072, 10240)),
        ("2k,1k..4k,100", (100, 1024, 2048, 4096)),
        ("5..5", (5,)),
    ],
)
def test_grammar(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0k", "1q", "k", "-1k", "1.5k", "1k..", "..1k", "..", "8k..1k", "1k..8k*1", "1k..8k*0", "1k..8k+0",
     "1k..8k*", "1k..8k+", "1k...8k", "1k,,2k", "1k..2k..4k", "1e3", "9999999999999", "1..100000+1", "१k"],
)  # fmt: skip
def test_malformed_sizes_name_what_came_and_what_is_accepted(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_sizes(text)
    assert "malformed size" in str(error.value)
    assert GRAMMAR in str(error.value)


@given(SIZES)
def test_a_formatted_size_reads_back(size: int) -> None:
    assert parse_size(format_tokens(size)) == size


@given(SIZES, SIZES, st.integers(2, 9))
def test_a_geometric_range_starts_at_its_first_end_and_stays_inside(a: int, b: int, factor: int) -> None:
    first, last = sorted((a, b))
    sizes = parse_sizes(f"{first}..{last}*{factor}")
    assert sizes[0] == first
    assert sizes[-1] <= last < sizes[-1] * factor
    assert all(later == earlier * factor for earlier, later in itertools.pairwise(sizes))


@given(SIZES, SIZES, st.integers(300, 9000))
def test_an_arithmetic_range_is_pythons_range(a: int, b: int, step: int) -> None:
    first, last = sorted((a, b))
    assert parse_sizes(f"{first}..{last}+{step}") == tuple(range(first, last + 1, step))


@given(st.lists(SIZES, min_size=1, max_size=20))
def test_a_list_is_sorted_without_repetition(sizes: list[int]) -> None:
    assert parse_sizes(",".join(map(str, sizes))) == tuple(sorted(set(sizes)))


@given(st.text(alphabet="0123456789kKmM.,*+- ", max_size=12))
def test_any_text_is_either_sizes_or_a_user_error(text: str) -> None:
    try:
        sizes = parse_sizes(text)
    except UserError:
        return
    assert sizes
    assert all(size >= 1 for size in sizes)
    assert list(sizes) == sorted(set(sizes))
