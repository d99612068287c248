"""What the sections of a page work on: the runs, their frame and views, the methods' looks, the figures so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from ctxbench.analysis.frame import View, fastest, to_frame, views
from ctxbench.analysis.runs import Run
from ctxbench.method import Method
from ctxbench.registry import Registry
from ctxbench.reports.figures import canvas
from ctxbench.reports.palette import Style, looks, styles


@dataclass(frozen=True)
class Chart:
    """A figure of the page: the key of its Plotly JSON, its static SVG, and the words that stand for it."""

    key: str
    caption: str
    svg: Markup


@dataclass
class Report:
    """One report in the making. ``figures`` collects the Plotly JSON of all charts, by key."""

    runs: list[Run]
    registry: Registry
    title: str
    figures: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All rows."""
        return to_frame(self.runs)

    @cached_property
    def views(self) -> list[View]:
        """What one chart each can show; the first is shown first."""
        return views(self.frame)

    @cached_property
    def styles(self) -> Mapping[str, Style]:
        """Colour, marker and dash by method."""
        return styles(self.frame["method"])

    @cached_property
    def looks(self) -> Mapping[str, Style]:
        """Colour, marker, dash and width by series."""
        return looks(self.frame)

    def shown(self, view: View) -> set[str]:
        """The series a chart shows at first: the fastest of each method."""
        return set(fastest(view.frame).values())

    def method(self, name: str) -> Method | None:
        """The method as it is installed here, or None."""
        entry = self.registry.entries.get(name)
        return entry.method if entry else None

    def info(self, *path: str) -> Any:
        """A value of the first run's ``run.json``, or None where it has none."""
        value: Any = self.runs[0].info
        for key in path:
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value

    def chart(self, key: str, caption: str, interactive: dict[str, Any], static: Figure) -> Chart:
        """Register the two forms of a figure."""
        self.figures[key] = interactive
        return Chart(key, caption, Markup(canvas.inline_svg(static, caption)))  # texts are escaped by matplotlib
