"""The key to a method: its line and marker as a small SVG."""

from __future__ import annotations

from markupsafe import Markup

from ctxbench.reports.palette import DASHES, Style

# Outlines in a box of 10 x 10 around the origin, as Plotly draws the symbols.
SHAPES = {
    "circle": '<circle r="3.6"/>',
    "square": '<path d="M-3.3-3.3h6.6v6.6h-6.6z"/>',
    "diamond": '<path d="M0-4.4 4.4 0 0 4.4-4.4 0z"/>',
    "triangle-up": '<path d="M0-4 4 3.2H-4z"/>',
    "triangle-down": '<path d="M0 4 4-3.2H-4z"/>',
    "star": '<path d="M0-4.6 1.1-1.5 4.4-1.4 1.8.6 2.7 3.7 0 1.9-2.7 3.7-1.8.6-4.4-1.4-1.1-1.5z"/>',
    "pentagon": '<path d="M0-4.2 4-1.3 2.5 3.4H-2.5L-4-1.3z"/>',
    "cross": '<path d="M-1.4-4h2.8v2.6H4v2.8H1.4V4h-2.8V1.4H-4v-2.8h2.6z"/>',
}


def swatch(style: Style, marker: bool = True) -> Markup:
    """Line and marker of a series as a small SVG."""
    dash = "" if style.dash == DASHES[0] else f' stroke-dasharray="{style.dash.replace("px", "")}"'
    return Markup(
        f'<svg class="swatch" viewBox="-16 -6 32 12" aria-hidden="true" fill="{style.color}">'
        f'<path d="M-15 0H15" stroke="{style.color}" stroke-width="{style.width}"{dash}/>'
        f"{SHAPES[style.marker] if marker else ''}</svg>"
    )
