"""A method's reach as a small picture: outputs run down, inputs to the right."""

from __future__ import annotations

from markupsafe import Markup
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ctxbench.analysis.printable import printable
from ctxbench.analysis.reach import CLAIMED, GRADIENT, NONE, UNCLAIMED, VALUES, ReachMap
from ctxbench.reports.figures import canvas

WORDS = {
    GRADIENT: "reaches the output, with a gradient", VALUES: "reaches the output as a value, without a gradient",
    CLAIMED: "named by the method, not seen", UNCLAIMED: "seen, not named by the method",
}  # fmt: skip
TONES = {NONE: "#ffffff", GRADIENT: "#2450c8", VALUES: "#8fb0ee", CLAIMED: "#d9c48a", UNCLAIMED: "#c0392b"}


def data(found: ReachMap) -> list[tuple[str, int, int, int, int]]:
    """Rectangles ``(state, x, y, width, height)`` that cover the map: runs of inputs, equal rows together."""
    size = found.seq_len
    rows = [_runs([found.state(i, j) for j in range(size)]) for i in range(size)]
    rectangles: list[tuple[str, int, int, int, int]] = []
    open_: dict[tuple[str, int, int], int] = {}
    for y, runs in enumerate([*rows, []]):
        for key in [key for key in open_ if key not in runs]:
            start = open_.pop(key)
            rectangles.append((key[0], key[1], start, key[2], y - start))
        for key in runs:
            open_.setdefault(key, y)
    return rectangles


def _runs(states: list[str]) -> list[tuple[str, int, int]]:
    """Stretches of one state other than none: ``(state, start, width)``."""
    runs, start = [], 0
    for end in range(1, len(states) + 1):
        if end == len(states) or states[end] != states[start]:
            if states[start] != NONE:
                runs.append((states[start], start, end - start))
            start = end
    return runs


def svg(found: ReachMap) -> Markup:
    """The picture for the page, coloured by its style sheet: a path for every state."""
    size, paths = found.seq_len, []
    rectangles = data(found)
    for state in (GRADIENT, VALUES, CLAIMED, UNCLAIMED):
        path = "".join(f"M{x} {y}h{w}v{h}h-{w}z" for kind, x, y, w, h in rectangles if kind == state)
        if path:
            paths.append(f'<path class="{state}" d="{path}"/>')
    words = f"Inputs that reach each of {size} outputs of {found.method}"
    return Markup(
        f'<svg class="reach" role="img" aria-label="{words}" viewBox="0 0 {size} {size}" shape-rendering="crispEdges">'
        f'<rect class="frame" width="{size}" height="{size}"/>{"".join(paths)}</svg>'
    )


def static(found: ReachMap) -> Figure:
    """The same picture on paper, with its axes."""
    order = [NONE, GRADIENT, VALUES, CLAIMED, UNCLAIMED]
    states = [[order.index(found.state(i, j)) for j in range(found.seq_len)] for i in range(found.seq_len)]
    with canvas.style():
        chart = canvas.figure(3.2, 3.1)
        axes = chart.subplots()
        axes.grid(visible=False)
        axes.imshow(states, cmap=ListedColormap([TONES[state] for state in order]), vmin=-0.5, vmax=4.5,
                    interpolation="nearest")  # fmt: skip
        axes.set_xlabel("input position")
        axes.set_ylabel("output position")
        axes.set_title(printable(f"{found.method} / {found.impl}"), fontsize=9, loc="left")
        return chart
