"""Quantities at the entrance and at the exit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxbench.errors import UserError
from ctxbench.units import (
    counted,
    format_bytes,
    format_flops,
    format_seconds,
    format_tokens,
    parse_bytes,
    parse_fraction,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("1.5h", 5400),
        ("250ms", 0.25),
        (" 2 min ", 120),
        ("3m30s", 210),
        ("1h 5m", 3900),
        ("10m00s", 600),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(("text", "count"), [("512MiB", 2**29), ("16gib", 2**34), ("100", 100), ("1.5KiB", 1536)])
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


def test_a_percentage_needs_a_total() -> None:
    assert parse_bytes("80%", total=1000) == 800
    with pytest.raises(UserError):
        parse_bytes("80%")


@pytest.mark.parametrize(("text", "fraction"), [("2%", 0.02), ("0.02", 0.02), ("12.5%", 0.125)])
def test_precisions(text: str, fraction: float) -> None:
    assert parse_fraction(text) == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *(
            (parse_seconds, text)
            for text in ("", "0", "-1s", "1q", "1d", "s", "1 2", "nan", "inf", "3m30", "30s3m", "1m1m", "3m-1s")
        ),
        *((parse_bytes, text) for text in ("", "0", "1MB", "1mb", "-1", "150%", "0%", "GiB")),
        *((parse_fraction, text) for text in ("", "0", "100%", "1", "150%", "2s")),
    ],
    ids=lambda value: value.__name__ if callable(value) else repr(value),
)
def test_malformed_quantities_say_what_is_accepted(parse, text: str) -> None:
    with pytest.raises(UserError, match="accepted"):
        parse(text)


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        (format_seconds(8.12e-4), "812 us"),
        (format_seconds(0.0124), "12.4 ms"),
        (format_seconds(3.05), "3.05 s"),
        (format_seconds(370), "6m10s"),
        (format_seconds(3720), "1h02m"),
        (format_seconds(None), "-"),
        (format_seconds(0), "0 s"),
        (counted(1, "cell"), "1 cell"),
        (counted(0, "cell"), "0 cells"),
        (counted(1, "process"), "1 process"),
        (counted(2, "process"), "2 processes"),
        (format_bytes(512), "512 B"),
        (format_bytes(2048), "2.00 KiB"),
        (format_bytes(198 * 2**20), "198 MiB"),
        (format_bytes(1.5 * 2**30), "1.50 GiB"),
        (format_bytes(2**42), "4.00 TiB"),
        (format_bytes(None), "-"),
        (format_flops(33.6e6), "33.6 MFLOP"),
        (format_flops(1.2e12), "1.20 TFLOP"),
        (format_flops(5e18), "5.00 EFLOP"),
        (format_tokens(1024), "1k"),
        (format_tokens(2**20), "1m"),
        (format_tokens(1000), "1000"),
    ],
    ids=lambda value: value,
)
def test_formats(formatted: str, text: str) -> None:
    assert formatted == text


@given(st.floats(1e-6, 1e6))
def test_a_formatted_duration_is_within_half_a_percent_below_a_minute_and_half_a_second_above(seconds: float) -> None:
    text = format_seconds(seconds)
    if " " in text:
        number, unit = text.split()
        assert float(number) * {"us": 1e-6, "ms": 1e-3, "s": 1}[unit] == pytest.approx(seconds, rel=5.1e-3)
    elif "h" not in text:
        minutes, rest = text[:-1].split("m")
        assert abs(60 * int(minutes) + int(rest) - seconds) <= 0.5


@given(st.floats(1, 1e15))
def test_a_formatted_amount_of_memory_is_within_half_a_percent(count: float) -> None:
    number, unit = format_bytes(count).split()
    scale = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert float(number) * scale == pytest.approx(count, rel=5.1e-3, abs=0.51)
