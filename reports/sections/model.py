"""Every series against its formula."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ctxbench.analysis.frame import records, views
from ctxbench.analysis.printable import printable
from ctxbench.analysis.slopes import trend
from ctxbench.reports.figures import model
from ctxbench.reports.formulas import formulas
from ctxbench.reports.palette import status_of
from ctxbench.reports.report import Report
from ctxbench.reports.tables import cost_table, peak_table
from ctxbench.units import format_tokens

BASES = {
    "flops_formula": "the FLOPs by formula",
    "flops_counted": "the counted FLOPs (no formula is declared)",
    "flops_algorithmic": "the algorithm's FLOPs (neither a formula nor a count exists)",
}


FORECAST = "; forecast of "  # what follows it in a reason is of that length alone


def context(report: Report) -> dict[str, Any]:
    """What ``model.j2`` prints. Of several memory sizes, the one with the most measurements is shown."""
    chosen: dict[tuple[Any, ...], Any] = {}
    for view in report.views:  # the views with the most measurements come first
        rest = tuple((axis, value) for axis, value in view.values.items() if axis != "memory")
        chosen.setdefault(rest, view)
    swept = len(views(report.frame, across_memory=True)) < len(report.views)
    groups = []
    for name in sorted(report.frame["method"].unique()):
        cards = [_card(report, rows, view.label)
                 for view in chosen.values()
                 for _, rows in view.frame[view.frame["method"] == name].groupby("series", sort=True)]  # fmt: skip
        cards.sort(key=lambda card: "chart" not in card)  # what was measured first, side by side
        groups.append({"name": name, "title": _title(report, name), "cards": cards})
    return {"groups": groups, "swept": swept}


def _card(report: Report, rows: pd.DataFrame, label: str) -> dict[str, Any]:
    first = records(rows.iloc[:1])[0]
    table = model.data(rows)
    title = f"{first['series']}" + (f", {label}" if label else "")
    measured = table[table["latency_s"].notna()]
    card: dict[str, Any] = {
        "title": title,
        "impl": first["series"].removeprefix(f"{printable(first['method'])} / "),
        "label": label,
    }
    card["missing"] = _missing(table)
    if len(measured):
        style = report.styles[first["method"]]
        key = f"model-{len(report.figures)}"
        caption = f"{title}: time per call and scaled formula, residual in percent, local slope"
        card["chart"] = report.chart(key, caption, model.interactive(table, style), lambda: model.static(table, style))
        card["verdict"] = _verdict(table)
    card["formulas"], card["trouble"] = formulas(report.method(first["method"]), first)
    card["tables"] = [("FLOPs", *cost_table(rows)), ("Peak memory", *peak_table(rows))]
    return card


def _verdict(table: pd.DataFrame) -> str:
    """What the figure says, in words."""
    both = table[table["latency_s"].notna() & table["work"].notna()]
    if both.empty:
        return "There is no formula and no count to compare the times with."
    rate = float((both["work"] / both["model_s"]).iloc[0])
    text = f"The line is {BASES[table['basis'].iloc[0]]} at {rate / 1e9:.3g} GFLOP/s, the one fitted constant."
    seen, said = (trend(list(both["seq_len"]), list(both[column])) for column in ("latency_s", "work"))
    if seen and said:
        span = f" (95 % interval {seen.low:.2f} to {seen.high:.2f})" if seen.low == seen.low else ""
        text += f" Slope over all lengths: measured {seen.value:.2f}{span}, formula {said.value:.2f}."
    worst = both.sort_values("residual", key=abs).iloc[-1]
    return text + f" Largest residual {_signed(100 * worst['residual'])} % at {format_tokens(int(worst['seq_len']))}."


def _signed(value: float) -> str:
    return f"{value:+.0f}".replace("-", "\u2212")


def _missing(table: pd.DataFrame) -> list[str]:
    """Lengths without a measurement, with their reasons; equal reasons together, and what each was forecast to take."""
    reasons: dict[str, list[tuple[str, str]]] = {}
    for row in records(table[table["latency_s"].isna()]):
        reason, _, forecast = row["reason"].partition(FORECAST)
        why = status_of(row["status"]).words + (f": {reason}" if reason else "")
        reasons.setdefault(why, []).append((format_tokens(int(row["seq_len"])), forecast))
    lines = []
    for why, found in reasons.items():
        forecasts = [forecast.removesuffix(" a call") for _, forecast in found if forecast]
        more = f"{FORECAST}{', '.join(forecasts)} a call" if forecasts else ""
        lines.append(f"{', '.join(length for length, _ in found)}: {why}{more}")
    return lines


def _title(report: Report, name: str) -> str:
    method = report.method(name)
    return (method.title if method else "") or name
