"""Static figures: one matplotlib style, and SVG that is small, stable and takes its ink from the page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctxbench.analysis.printable import printable

INK, GRID = "#5b6270", "#9aa0aa"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ctxbench",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.major.pad": 5.0,
    "ytick.major.pad": 5.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_SPACES = re.compile(r"(?<=[MLCQz]) (?=[-\d])|(?<=\d) (?=[MLCQz])| (?=-)|(?<=z) ")
_PATH = re.compile(r' d="[^"]*"')
_INVISIBLE = re.compile(r'<path d="[^"]*" style="fill: none"/>')
_SAME = re.compile(r'<g clip-path="([^"]*)">((?:<use [^>]* style="([^"]*)"/>)(?:<use [^>]* style="\3"/>)*)</g>')
_NEEDLESS = re.compile(
    r" ?stroke-(?:dashoffset: 0|linejoin: miter|linecap: square);?| xmlns:xlink=\"[^\"]*\"|(?<= )xlink:(?=href)"
)
_TAG = re.compile(r"<[^>]*>")
_GRID_LINE = re.compile(rf'clip-path="[^"]*" style="fill: none; stroke: {GRID}; stroke-opacity: 0.35[^"]*"')
_STROKES = re.compile(r'<path d="[^"]*" ([^>]*(?:fill: none|class="rule")[^>]*)/>(?:<path d="[^"]*" \1/>)+')
_DEFAULTS = '<defs><style type="text/css">*{stroke-linejoin: round; stroke-linecap: butt}</style></defs>'
_LABEL = re.compile(r' style="font-size: 9px; text-anchor: (start|middle|end); fill: currentColor"')
ANCHORS = {"start": "", "middle": ' class="m"', "end": ' class="e"'}  # the page's style sheet has the rest
_FONT = re.compile(r" font-family: [^;\"]*;| transform=\"rotate\(-0 [^)]*\)\"")
_BARE = re.compile(r'<g(?: id="[^"]*")?>')
_CLUTTER = re.compile(r"<g\b[^>]*/>|<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)


@contextmanager
def style() -> Iterator[None]:
    """The style of all static figures, for their construction and for saving them."""
    with mpl.rc_context(STYLE):
        yield


def figure(width: float = 4.4, height: float = 3.4) -> Figure:
    """A figure of that many inches with room for labels on the left, below and above.

    The margins are fixed: matplotlib's own search for them takes longer than the rest of the drawing.
    """
    chart = Figure(figsize=(width, height))
    chart.subplots_adjust(
        left=0.8 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.12 / height, hspace=0.12
    )
    return chart


def bare_log(axes: Axes, which: str, positions: list[Any], texts: list[str]) -> None:
    """Make an axis logarithmic with exactly these ticks."""
    chosen = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    chosen.set_minor_locator(mpl.ticker.NullLocator())
    chosen.set_major_locator(mpl.ticker.FixedLocator(positions))
    chosen.set_major_formatter(mpl.ticker.FixedFormatter(texts))


def legend(axes: Axes, wanted: bool = True) -> None:
    """A legend to the right of the chart, where it covers nothing."""
    if wanted and axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)


def save(chart: Figure, kind: str, box: str | None = "tight") -> bytes:
    """The figure as ``svg``, ``pdf`` or ``png``, by default cropped to its content; equal figures give equal bytes."""
    buffer = io.BytesIO()
    stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing")  # names may have any script; SVG keeps them as text
        background = "none" if kind == "svg" else "white"
        chart.savefig(buffer, format=kind, metadata=stamp, dpi=200, facecolor=background, bbox_inches=box)
    return buffer.getvalue()


def inline_svg(chart: Figure, title: str) -> str:
    """SVG for the page: coordinates to a tenth of a point, text and axes in the page's own ink."""
    svg = compact(save(chart, "svg", box=None).decode()).replace(INK, "currentColor")
    svg = _STROKES.sub(_join, _GRID_LINE.sub('class="rule"', svg)).replace(_DEFAULTS, "")
    svg = _TAG.sub(lambda tag: _LABEL.sub(lambda match: ANCHORS[match[1]], tag[0]), svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(printable(title))}" ', 1)


def _join(match: re.Match[str]) -> str:
    """Neighbouring strokes of one look as one path."""
    strokes = re.findall(r'<path d="([^"]*)"', match[0])
    return f'<path d="{"".join(strokes)}" {match[1]}/>'


def compact(svg: str) -> str:
    """The same drawing in fewer bytes: no metadata, no bare groups, tenths of a point, the page's own font.

    Texts between the tags stay as they are.
    """
    svg = _TAG.sub(lambda tag: _NEEDLESS.sub("", _FONT.sub("", _NUMBER.sub(_shorter, tag[0]))), _CLUTTER.sub("", svg))
    parts, dropped = [], []
    for part in re.split(r"(<g\b[^>]*>|</g>)", svg):
        if part.startswith("<g"):
            dropped.append(_BARE.fullmatch(part) is not None)
        if not (part.startswith("<g") and dropped[-1]) and not (part == "</g>" and dropped.pop()):
            parts.append(part)
    svg = _INVISIBLE.sub("", re.sub(r">\s+<", "><", re.sub(r"\s+", " ", "".join(parts))).strip())
    svg = _PATH.sub(lambda path: _SPACES.sub("", path[0]), svg)
    return _SAME.sub(_common_style, svg)


def _common_style(group: re.Match[str]) -> str:
    inside = group[2].replace(f' style="{group[3]}"', "")
    return f'<g clip-path="{group[1]}" style="{group[3]}">{inside}</g>'


def _shorter(number: re.Match[str]) -> str:
    value = float(number[0])
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}".removesuffix(".0")
