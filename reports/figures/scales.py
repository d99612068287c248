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
    "x": ((1.0, "\u00d7"),),
}


def text(value: float, unit: str) -> str:
    """A tick's text: ``20 ms``, ``64 MiB``, ``1.5 TFLOP``, ``0.5 x``."""
    if value == 0:
        return "0"
    scales = UNITS[unit]
    factor, name = next((scale for scale in reversed(scales) if abs(value) >= scale[0] * 0.9995), scales[0])
    return f"{value / factor:.3g} {name}"


def log_ticks(values: Iterable[float], unit: str, most: int = 7) -> tuple[list[float], list[str]]:
    """Ticks that cover positive values on a logarithmic axis: decades, or powers of two for bytes."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return [], []
    low, high = min(positive), max(positive)
    if unit == "B":
        ticks = _powers(low, high, 2.0, most)
    elif high / low < 20:
        mantissas = (1, 2, 5) if high / low > 2.5 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        grid = [m * 10.0**power for power in range(first, last + 1) for m in mantissas]
        ticks = [tick for tick in grid if low / 1.3 <= tick <= high * 1.3]
    else:
        ticks = _powers(low, high, 10.0, most)
    return ticks, [text(tick, unit) for tick in ticks]


def token_ticks(lengths: Iterable[int], most: int = 10) -> tuple[list[int], list[str]]:
    """Ticks at the measured lengths where these are few, else at powers of two: ``1k 2k 4k``."""
    unique = sorted(set(lengths))
    far = all(b / a > 1.45 for a, b in itertools.pairwise(unique))
    if len(unique) > most or not far:
        unique = [round(tick) for tick in _powers(unique[0], unique[-1], 2.0, most)] or unique[:1]
    return unique, [format_tokens(tick) for tick in unique]


def log_range(values: Iterable[float], margin: float = 0.06) -> list[float]:
    """Range of a logarithmic axis as powers of ten, with a margin on both sides."""
    logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    span = max(max(logs) - min(logs), 0.3)
    return [min(logs) - margin * span, max(logs) + margin * span]


def _powers(low: float, high: float, base: float, most: int) -> list[float]:
    first, last = (round(math.log(low, base), 6), round(math.log(high, base), 6))
    step = max(1, math.ceil((last - first) / most))
    begin = math.floor(first / step) * step
    ticks = [base ** (begin + i * step) for i in range(most + 3)]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return inside if len(inside) > 1 else [tick for tick in ticks if low / base <= tick <= high * base]
