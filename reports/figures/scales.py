"""Axes: tick positions and their texts with units, for logarithmic axes of tokens, seconds, bytes, FLOPs and ratios."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from ctxbench.units import format_tokens

UNITS = {
    "s": ((1e-9, "ns"), (1e-6, "\u00b5s"), (1e-3, "ms"), (1.0, "s"), (1e3, "ks")),
    "B": ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB"), (2.0**40, "TiB")),
    "FLOP": tuple((10.0 ** (3 * i), f"{prefix}FLOP") for i, prefix in enumerate(("", "k", "M", "G", "T", "P", "E"))),
    "FLOP/s": tuple((10.0 ** (3 * i), f"{prefix}FLOP/s") for i, prefix in enumerate(("", "k", "M", "G", "T", "P"))),
    "B/s": ((1.0, "B/s"), (2.0**10, "KiB/s"), (2.0**20, "MiB/s"), (2.0**30, "GiB/s"), (2.0**40, "TiB/s")),
    "x": ((1.0, "\u00d7"),),
    "": ((1.0, ""),),
}


def text(value: float, unit: str) -> str:
    """A tick's text: ``20 ms``, ``64 MiB``, ``1.5 TFLOP``, ``0.5 x``."""
    if value == 0:
        return "0"
    scales = UNITS[unit]
    factor, name = next((scale for scale in reversed(scales) if abs(value) >= scale[0] * 0.9995), scales[0])
    shown = value / factor
    return f"{f'{shown:,.0f}' if shown >= 1000 else f'{shown:.3g}'} {name}".rstrip()


def log_ticks(values: Iterable[float], unit: str, most: int = 7) -> tuple[list[float], list[str]]:
    """Ticks inside the range of a logarithmic axis: decades, or powers of two for bytes; finer where it is narrow."""
    low, high = (10**edge for edge in log_range(values))
    base = 2.0 if unit == "B" else 10.0
    ticks = _inside(_powers(low, high, base, most), low, high)
    if len(ticks) < 3 and base == 10:
        ticks = _inside([m * tick for tick in _powers(low / 10, high, base, most) for m in (1, 2, 5)], low, high)
    if len(ticks) < 3:
        ticks = _inside(even_steps(low, high, base), low, high)
    return ticks, [text(tick, unit) for tick in ticks]


def even_steps(low: float, high: float, base: float) -> list[float]:
    """Three to six multiples of a round number from 0 to ``high``, as far as they lie above ``low``."""
    raw = (high - low) / 5
    power = base ** math.floor(math.log(raw, base) + 1e-9)
    step = next(m * power for m in ((1, 2) if base == 2 else (1, 2, 5, 10)) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def token_ticks(lengths: Iterable[int], most: int = 10) -> tuple[list[int], list[str]]:
    """Ticks at the measured lengths where these are few, else at powers of two: ``1k 2k 4k``."""
    unique = sorted(set(lengths))
    far = all(b / a > 1.45 for a, b in itertools.pairwise(unique))
    if len(unique) > most or not far:
        powers = _inside(_powers(unique[0], unique[-1], 2.0, most), unique[0], unique[-1])
        unique = [round(tick) for tick in powers] or unique[:1]
    return unique, [format_tokens(tick) for tick in unique]


def log_range(values: Iterable[float], margin: float = 0.06) -> list[float]:
    """Range of a logarithmic axis as powers of ten, with a margin on both sides."""
    logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    span = max(max(logs) - min(logs), 0.3)
    return [min(logs) - margin * span, max(logs) + margin * span]


def _powers(low: float, high: float, base: float, most: int) -> list[float]:
    first, last = (round(math.log(edge, base), 6) for edge in (low, high))
    step = max(1, math.ceil((last - first) / most))
    return [base**power for power in range(math.floor(first / step) * step, math.ceil(last) + 1, step)]


def _inside(ticks: list[float], low: float, high: float) -> list[float]:
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
