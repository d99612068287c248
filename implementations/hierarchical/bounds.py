"""What a token sees of a scale, as the two lines that kernels and block lists take; neither torch nor triton here."""

from __future__ import annotations

from ctxbench.implementations._shared.lines import Line
from ctxbench.implementations.hierarchical.params import Scale


def bounds(scale: Scale, missing: int) -> tuple[Line | None, Line]:
    """The first cell a token sees, and one past its last; the first ``missing`` cells are not at hand."""
    high = Line(scale.span, 1, 1 - scale.behind, -missing)
    if scale.handed is not None:
        return Line(scale.span * scale.group, scale.group, 1 - scale.handed, -missing), high
    return None if scale.most is None else high._replace(base=high.base - scale.most), high
