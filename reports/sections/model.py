"""Every series against its formula."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ctxbench.analysis.frame import records, views
from ctxbench.analysis.printable import printable
from ctxbench.analysis.slopes import Trend, trend
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
    """What ``model.j2`` prints. Of several memory sizes, the one with the most measurements is shown.

    Of each method the impl that stands for it is open, its other impls are folded, those never measured share lines.
    """
    chosen: dict[tuple[Any, ...], Any] = {}
    for view in report.views:  # the views with the most measurements come first
        rest = tuple((axis, value) for axis, value in view.values.items() if axis != "memory")
        chosen.setdefault(rest, view)
    swept = len(views(report.frame, across_memory=True)) < len(report.views)
    groups = []
    for name in sorted(report.frame["method"].unique()):
        cards = [_card(report, rows, view.label, series in report.shown(view))
                 for view in chosen.values()
                 for series, rows in view.frame[view.frame["method"] == name].groupby("series", sort=True)]  # fmt: skip
        measured = [card for card in cards if "chart" in card]
        groups.append({
            "name": name, "title": _title(report, name),
            "cards": [card for card in measured if card["stands"]],
            "others": [card for card in measured if not card["stands"]],
            "unmeasured": _together([card for card in cards if "chart" not in card]),
        })  # fmt: skip
    return {"groups": groups, "swept": swept}


def _card(report: Report, rows: pd.DataFrame, label: str, stands: bool) -> dict[str, Any]:
    first = records(rows.iloc[:1])[0]
    table = model.data(rows)
    title = f"{first['series']}" + (f", {label}" if label else "")
    measured = table[table["latency_s"].notna()]
    card: dict[str, Any] = {
        "title": title,
        "impl": first["series"].removeprefix(f"{printable(first['method'])} / "),
        "label": label,
        "stands": stands,
    }
    card["missing"] = _missing(table)
    if len(measured):
        style = report.styles[first["method"]]
        key = f"model-{len(report.figures)}"
        caption = f"{title}: time per call and scaled formula, residual in percent, local slope"
        card["chart"] = report.chart(key, caption, model.interactive(table, style), lambda: model.static(table, style),
                                     draw=stands or report.static)  # fmt: skip
        card["verdict"] = _verdict(table)
        card["brief"] = _brief(table)
    card["formulas"], card["trouble"] = formulas(report.method(first["method"]), first)
    card["tables"] = [("FLOPs", *cost_table(rows)), ("Peak memory", *peak_table(rows))]
    return card


def _together(cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Impls that were never measured, those with the same lengths and reasons in one entry."""
    entries: dict[tuple[str, ...], dict[str, Any]] = {}
    for card in cards:
        entry = entries.setdefault((card["label"], *card["missing"]), {"missing": card["missing"], "cards": []})
        entry["cards"].append(card)
    return list(entries.values())


def _brief(table: pd.DataFrame) -> str:
    """The same in the few words of a folded card."""
    both = _compared(table)
    measured = list(table.loc[table["latency_s"].notna(), "seq_len"])
    span = " to ".join(dict.fromkeys((format_tokens(measured[0]), format_tokens(measured[-1]))))
    if both.empty:
        return f"{span}, no formula"
    seen, said = _trends(both)
    slopes = f", slope {seen.value:.2f}, formula {said.value:.2f}" if seen and said else ""
    worst = both.sort_values("residual", key=abs).iloc[-1]
    return f"{span}{slopes}, residual up to {_signed(100 * worst['residual'])} %"


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["latency_s"].notna() & table["work"].notna()]


def _trends(both: pd.DataFrame) -> list[Trend | None]:
    return [trend(list(both["seq_len"]), list(both[column])) for column in ("latency_s", "work")]


def _verdict(table: pd.DataFrame) -> str:
    """What the figure says, in words."""
    both = _compared(table)
    if both.empty:
        return "There is no formula and no count to compare the times with."
    rate = float((both["work"] / both["model_s"]).iloc[0])
    text = f"The line is {BASES[table['basis'].iloc[0]]} at {rate / 1e9:.3g} GFLOP/s, the one fitted constant."
    seen, said = _trends(both)
    if seen and said:
        span = (
            f" (95 % interval {seen.low:.2f} to {seen.high:.2f})".replace("-", "\u2212") if seen.low == seen.low else ""
        )
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
        which = "all lengths" if len(found) == len(table) > 2 else ", ".join(length for length, _ in found)
        lines.append(f"{which}: {why}{more}")
    return lines


def _title(report: Report, name: str) -> str:
    method = report.method(name)
    return (method.title if method else "") or name
