"""Seconds, bytes, FLOPs and tokens: parsed at the entrance, formatted at the exit, plain numbers inside."""

from __future__ import annotations

import re

from ctxbench.errors import UserError

_BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z%]*)\s*")


def _split(text: str, what: str, accepted: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UserError(f"malformed {what} {text!r}\n  accepted: {accepted}")
    return float(match[1]), match[2].lower()


def parse_seconds(text: str) -> float:
    """Read a duration such as ``90``, ``90s``, ``10m``, ``1.5h`` or ``3m30s`` as seconds."""
    accepted = "a positive number with ms, s, m or h, for example 90s, 10m or 3m30s"
    parts = [(float(value), unit.lower()) for value, unit in _NUMBER.findall(text)]
    sizes = [_SECONDS.get(unit, 0.0) for _, unit in parts]
    whole = re.fullmatch(f"(?:{_NUMBER.pattern})+", text) is not None
    falling = sizes == sorted(set(sizes), reverse=True) and (len(parts) == 1 or all(unit for _, unit in parts))
    total = sum(value * size for (value, _), size in zip(parts, sizes, strict=True))
    if not (whole and falling and all(sizes) and total > 0):
        raise UserError(f"malformed duration {text!r}\n  accepted: {accepted}")
    return total


def parse_bytes(text: str, total: int | None = None) -> int:
    """Read an amount of memory such as ``512MiB``, ``16GiB`` or, where ``total`` is known, ``80%`` as bytes."""
    accepted = "a positive number with KiB, MiB or GiB, or a percentage of the memory, for example 16GiB or 80%"
    value, unit = _split(text, "amount of memory", accepted)
    if unit == "%" and total is not None and 0 < value <= 100:
        return int(total * value / 100)
    if unit not in _BYTES or value <= 0:
        raise UserError(f"malformed amount of memory {text!r}\n  accepted: {accepted}")
    return int(value * _BYTES[unit])


def parse_fraction(text: str) -> float:
    """Read a precision such as ``2%`` or ``0.02`` as a fraction."""
    value, unit = _split(text, "precision", "a percentage such as 2%")
    fraction = value / 100 if unit == "%" else value
    if unit not in ("", "%") or not 0 < fraction < 1:
        raise UserError(f"malformed precision {text!r}\n  accepted: a percentage above 0 and below 100, such as 2%")
    return fraction


def format_seconds(seconds: float | None) -> str:
    """Three significant digits and the unit a reader would choose: ``812 us``, ``12.4 ms``, ``3.05 s``, ``6m10s``."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0 s"
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (100.0, 1.0, "s")):
        if seconds < limit:
            return f"{significant(seconds * factor)} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def format_bytes(count: float | None) -> str:
    """Binary units: ``512 B``, ``2.00 KiB``, ``198 MiB``, ``1.50 GiB``."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{significant(count)} {unit}"
        count /= 1024
    return f"{significant(count)} TiB"


def format_flops(count: float | None) -> str:
    """Decimal units: ``33.6 MFLOP``, ``1.20 TFLOP``."""
    if count is None:
        return "-"
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000:
            return f"{significant(count)} {unit}FLOP"
        count /= 1000
    return f"{significant(count)} EFLOP"


def format_tokens(count: int | None) -> str:
    """Sizes as the command line writes them: ``1k`` is 1024 tokens, ``1m`` is 1048576."""
    if count is None:
        return "-"
    if count and count % 2**20 == 0:
        return f"{count // 2**20}m"
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)


def counted(number: int, noun: str) -> str:
    """A number of things: ``1 cell``, ``2 cells``, ``3 processes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def significant(value: float) -> str:
    """Three significant digits without an exponent in the range the other formatters use."""
    magnitude = abs(value)
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2
    return f"{value:.{digits}f}"
