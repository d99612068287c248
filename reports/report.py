"""What the sections of a page work on: the runs, their frame and views, the methods' looks, the figures so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from ctxbench.analysis.curves import Curve, curves
from ctxbench.analysis.forecast import Forecaster
from ctxbench.analysis.frame import View, fastest, to_frame, views
from ctxbench.analysis.runs import Run
from ctxbench.cost.machine import built_in
from ctxbench.cost.roofline import Ceilings
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


@dataclass(frozen=True)
class Setting:
    """Curves that may be compared: one run, one mode, device, dtype and size; memory sizes stay together."""

    run: Run
    label: str
    curves: list[Curve]

    @property
    def lengths(self) -> list[int]:
        """Lengths at which anything was measured."""
        return sorted({row.seq_len for curve in self.curves for row in curve.rows})


@dataclass
class Report:
    """One report in the making. ``figures`` collects the Plotly JSON of all charts, by key.

    ``static``: a page without scripts, on which every picture is drawn.
    """

    runs: list[Run]
    registry: Registry
    title: str
    static: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    _forecasters: dict[str, Forecaster] = field(default_factory=dict)
    _shown: dict[int, frozenset[str]] = field(default_factory=dict)  # by view, which the report keeps

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

    @cached_property
    def settings(self) -> list[Setting]:
        """What can be compared with each other, the setting with the most measurements first."""
        groups: dict[tuple[str, str], Setting] = {}
        for run in self.runs:
            for curve in curves(run.rows):
                key = (run.name, repr(curve.setting))
                groups.setdefault(key, Setting(run, "", [])).curves.append(curve)
        known = list(groups.values())
        axes: dict[str, set[Any]] = {}
        for setting in known:
            for name, value in {"run": setting.run.name, **setting.curves[0].setting}.items():
                axes.setdefault(name, set()).add(value)
        found = []
        for setting in known:
            values = {"run": setting.run.name, **setting.curves[0].setting}
            label = ", ".join(f"{name} {value}" for name, value in values.items() if len(axes[name]) > 1)
            found.append(Setting(setting.run, label, setting.curves))
        return sorted(found, key=lambda setting: -sum(len(curve.rows) for curve in setting.curves))

    @cached_property
    def series_of(self) -> Mapping[str, str]:
        """The series that a cell belongs to, by the cell's key."""
        return dict(zip(self.frame["cell"], self.frame["series"], strict=True))

    def forecaster(self, setting: Setting) -> Forecaster:
        """Fits and formulas for the cells of a setting; no ceiling enters what is asked of it here."""
        rows, name = setting.run.rows, setting.run.name
        if name not in self._forecasters:
            device = built_in(rows[0].device, rows[0].threads)
            self._forecasters[name] = Forecaster(self.registry, device, rows)
        return self._forecasters[name]

    def ceilings(self, view: View) -> Ceilings | None:
        """What the device of a view was measured to reach; None in a run that left no calibration."""
        run, device = view.frame["run"].iloc[0], view.frame["device"].iloc[0]
        info = next((each.info for each in self.runs if each.name == run), {})
        stored = info.get("calibration")
        try:
            found = msgspec.convert(stored[device] if isinstance(stored, Mapping) else None, Ceilings)
        except (KeyError, TypeError, msgspec.ValidationError):
            return None
        return found if found.calibrated and found.flops_per_s else None

    def shown(self, view: View) -> set[str]:
        """The series a chart shows at first: the fastest of each method."""
        if id(view) not in self._shown:
            self._shown[id(view)] = frozenset(fastest(view.frame).values())
        return set(self._shown[id(view)])

    def method(self, name: str) -> Method | None:
        """The method as it is installed here, or None."""
        return self.registry.get(name)

    def info(self, *path: str) -> Any:
        """A value of the first run's ``run.json``, or None where it has none."""
        value: Any = self.runs[0].info
        for key in path:
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value

    def chart(
        self, key: str, caption: str, interactive: dict[str, Any], static: Callable[[], Figure], draw: bool = True
    ) -> Chart:
        """Register the two forms of a figure; ``draw=False`` for one that is reached by a control alone."""
        self.figures[key] = interactive
        # Texts are escaped by matplotlib.
        return Chart(key, caption, Markup(canvas.inline_svg(static(), caption)) if draw else Markup(""))
