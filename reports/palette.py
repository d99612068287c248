"""How a method looks: colour, marker and dash, chosen by a hash of its name so that it looks the same in every report.

The eight colours keep a contrast of at least 3:1 on the light and on the dark background, and stay apart under
protanopia, deuteranopia and tritanopia. Marker and dash repeat the distinction without colour.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

LIGHT, DARK = "#ffffff", "#14171c"
COLORS = ("#3c69f2", "#a05a28", "#c93271", "#09776e", "#8b51b5", "#f25d13", "#109bc9", "#739643")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "pentagon", "cross")
DASHES = ("solid", "10px,3px", "8px,2px,2px,2px", "5px,2px")  # dotted lines are forecasts
MPL_MARKERS = dict(zip(MARKERS, "osD^v*pP", strict=True))
SECOND_DASHES = ("4px,1.5px", "12px,3px,2px,3px", "2px,2px,6px,2px")  # of a method's second, third, fourth series
IMPL_ORDER = ("blocked", "triton", "flex", "flash_attn", "xformers", "reference", "as_written")
MPL_DASHES = {
    dash: "-" if dash == "solid" else (0, [float(px[:-2]) for px in dash.split(",")])
    for dash in (*DASHES, *SECOND_DASHES)
}
_SALT = (384).to_bytes(2, "little")  # spreads the built-in methods evenly over the colours


@dataclass(frozen=True)
class Style:
    """Colour and, for readers who see no colours, marker and dash. ``width`` and ``size`` are in pixels."""

    color: str
    marker: str
    dash: str
    width: float = 2.0
    size: float = 7.0


@dataclass(frozen=True)
class Status:
    """How a point without a measurement is drawn: Plotly symbol, matplotlib marker, one character, words."""

    symbol: str
    marker: Any
    glyph: str
    words: str


_BOWTIE = [(-1, -1), (-1, 1), (1, -1), (1, 1), (-1, -1)]
STATUSES = {
    "ok": Status("circle", "o", "●", "measured"),
    "unstable": Status("circle", "o", "◐", "measured, precision not reached"),
    "unsupported": Status("line-ew-open", "_", "–", "not supported"),
    "skipped": Status("triangle-right-open", ">", "▷", "skipped"),
    "oom": Status("x-thin-open", "x", "✕", "out of memory"),
    "timeout": Status("bowtie-open", _BOWTIE, "\u22c8", "timeout"),
    "killed": Status("cross-thin-open", "+", "+", "killed"),
    "gate_failed": Status("diamond-x-open", "D", "◈", "gate failed"),
    "error": Status("asterisk-open", (6, 2, 0), "✱", "error"),
}


def status_of(name: str) -> Status:
    """The look of a status; a status of a later version looks like an error and keeps its own name."""
    return STATUSES.get(name) or Status("asterisk-open", (6, 2, 0), "✱", name)


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """A look for every method: its hash chooses, a taken colour passes on to the next free one, in order of names.

    Methods beyond the eighth share a colour and differ in marker and dash; no two of 64 methods look alike.
    """
    chosen: dict[str, Style] = {}
    uses = [0] * len(COLORS)
    for name in sorted(set(methods)):
        digest = hashlib.blake2b(name.encode(), digest_size=8, salt=_SALT).digest()
        start = int.from_bytes(digest, "little") % len(COLORS)
        order = [(start + step) % len(COLORS) for step in range(len(COLORS))]
        color = min(order, key=lambda index: uses[index])
        turn = uses[color]
        marker = MARKERS[(color + 3 * turn) % len(MARKERS)]
        chosen[name] = Style(COLORS[color], marker, DASHES[(color + turn) % len(DASHES)])
        uses[color] += 1
    return chosen


def looks(frame: pd.DataFrame) -> dict[str, Style]:
    """A look for every series: its method's, with thinner lines of other dashes from the second series on."""
    methods = styles(frame["method"])
    order = {name: index for index, name in enumerate(IMPL_ORDER)}
    rows = sorted(
        set(frame[["method", "impl", "series"]].itertuples(index=False, name=None)),
        key=lambda row: (row[0], order.get(row[1], len(order)), row[2]),
    )
    chosen, ranks = {}, Counter[str]()
    for method, _, series in rows:
        look, rank = methods[method], ranks[method]
        if rank:
            look = replace(look, dash=SECOND_DASHES[(rank - 1) % len(SECOND_DASHES)], width=1.2, size=5.0)
        chosen[series] = look
        ranks[method] += 1
    return chosen


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours (WCAG 2)."""
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
