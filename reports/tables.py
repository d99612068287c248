"""Rows as tables: for the page (numbers to sort by, texts to read), and as CSV, Markdown, LaTeX and Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ctxbench.analysis.frame import records
from ctxbench.errors import EnvironmentUnusable
from ctxbench.reports.figures import scales
from ctxbench.reports.palette import STATUSES, status_of
from ctxbench.units import format_tokens, significant


class Value(NamedTuple):
    """One entry of a table: what is read, what it sorts by, and whether it is a number (aligned to the right)."""

    text: str
    sort: float | str
    number: bool = False


BRIEF = {
    "method": "method", "impl": "impl", "seq_len": "tokens", "memory": "memory", "status": "status",
    "latency_s": "latency", "interval": "interval", "tokens_per_s": "tokens/s", "peak_allocated": "peak memory",
    "flops_formula": "FLOPs (formula)", "flops_counted": "counted / formula", "state_measured": "state",
    "gate_error": "gate error", "warnings": "warnings", "reason": "reason",
}  # fmt: skip
MORE = {
    "latency_low_s": "low", "latency_high_s": "high", "cpu_s": "CPU time", "n_processes": "processes",
    "n_samples": "samples", "stop": "stopped by", "peak_resident": "resident peak", "peak_formula": "peak (formula)",
    "parameters_measured": "parameters", "forecast_s": "forecast", "energy_j": "energy (J)",
}  # fmt: skip
OPTIONAL = ("run", "mode", "device", "dtype", "batch_size", "d_model", "num_heads", "num_layers", "d_ff", "causal",
            "position", "threads")  # fmt: skip


def columns(frame: pd.DataFrame, more: bool = False) -> dict[str, str]:
    """Columns of the page's table with their titles: the usual ones, and every axis that takes several values.

    ``more`` adds those that a reader may ask for, as far as any row fills them.
    """
    varying = [name for name in OPTIONAL if frame[name].nunique(dropna=False) > 1]
    names = ["method", "impl", *varying, *list(BRIEF)[2:]]
    if frame["memory"].isna().all():
        names.remove("memory")
    asked = [name for name in MORE if more and not frame[name].isin(["", "{}", 0]).all() and frame[name].notna().any()]
    return {name: BRIEF.get(name) or MORE.get(name) or name.replace("_", " ") for name in (*names, *asked)}


def entries(frame: pd.DataFrame, more: bool = False) -> list[list[Value]]:
    """Every row of the frame as the entries of :func:`columns`."""
    names = columns(frame, more)
    return [[_entry(row, name) for name in names] for row in records(frame)]


def _entry(row: dict[str, Any], name: str) -> Value:
    if name == "interval":
        return _interval(row)
    if name == "flops_counted":
        return _ratio(row["flops_counted"], row["flops_formula"])
    if name == "warnings":
        count = len([part for part in row[name].split("; ") if part])
        return Value(str(count) if count else "", count, True)
    if name == "status":
        return Value(f"{status_of(row[name]).glyph} {row[name]}", row[name])
    value = row["peak_resident"] if name == "peak_allocated" and pd.isna(row[name]) else row[name]
    if isinstance(value, str):
        return Value(value, value)
    if pd.isna(value):
        return Value("", -1.0, True)
    if isinstance(value, bool):
        return Value("yes" if value else "no", float(value))
    return Value(_text(name, value), float(value), True)


def _text(name: str, value: Any) -> str:
    if name in ("seq_len", "memory"):
        return format_tokens(int(value))
    if name in ("latency_s", "latency_low_s", "latency_high_s", "cpu_s", "forecast_s"):
        return scales.text(value, "s")
    if name in ("peak_allocated", "peak_resident", "peak_formula", "state_measured"):
        return scales.text(float(value), "B")
    if name == "flops_formula":
        return scales.text(float(value), "FLOP")
    if name == "gate_error":
        return f"{value:.1e}"
    if name in ("n_processes", "n_samples"):
        return str(int(value))
    return f"{value:,.0f}" if value >= 100 else significant(value).removesuffix(".00")


def _interval(row: dict[str, Any]) -> Value:
    """Half width of the latency's interval as a share of the median."""
    if not row["latency_s"] > 0 or pd.isna(row["latency_low_s"]) or pd.isna(row["latency_high_s"]):
        return Value("", -1.0, True)
    share = 50 * (row["latency_high_s"] - row["latency_low_s"]) / row["latency_s"]
    return Value(f"\u00b1 {significant(share)} %", share, True)


def _ratio(part: Any, whole: Any) -> Value:
    if pd.isna(part) or pd.isna(whole) or not whole:
        return Value("", -1.0, True)
    return Value("equal" if part == whole else f"{part / whole:.4g}", float(part) / float(whole), True)


def cost_table(series: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """FLOPs of one series at every length: algorithmic, formula, counted, and their ratios."""
    head = ["tokens", "algorithmic", "formula", "counted", "formula / algorithmic", "counted / formula"]
    body = []
    for row in records(series.sort_values("seq_len")):
        numbers = [row[f"flops_{kind}"] for kind in ("algorithmic", "formula", "counted")]
        ratios = [_ratio(numbers[1], numbers[0]).text, _ratio(numbers[2], numbers[1]).text]
        body.append(
            [format_tokens(row["seq_len"]), *(_number(n, "FLOP") for n in numbers), *(r or "-" for r in ratios)]
        )
    return head, body


def peak_table(series: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Peak memory of one series at every length: formula, traced, allocated, resident, and one ratio."""
    head = ["tokens", "formula", "traced", "allocated", "resident", "allocated / formula"]
    body = []
    for row in records(series.sort_values("seq_len")):
        numbers = [row[f"peak_{kind}"] for kind in ("formula", "traced", "allocated", "resident")]
        ratio = _ratio(numbers[2], numbers[0]).text or "-"
        body.append([format_tokens(row["seq_len"]), *(_number(n, "B") for n in numbers), ratio])
    return head, body


def _number(value: Any, unit: str) -> str:
    return "-" if pd.isna(value) else scales.text(float(value), unit)


def to_csv(frame: pd.DataFrame) -> str:
    """All flat columns, plain numbers, units in the names."""
    return str(frame.drop(columns="series").to_csv(index=False, lineterminator="\n"))


def to_markdown(frame: pd.DataFrame) -> str:
    """The page's table as Markdown."""
    head = list(columns(frame).values())
    rows = [[_markdown(value.text) for value in row] for row in entries(frame)]
    numeric = [value.number for value in entries(frame.iloc[:1])[0]]
    lines = [head, ["---:" if number else "---" for number in numeric], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_latex(frame: pd.DataFrame) -> str:
    """The page's table as a LaTeX tabular with booktabs rules."""
    head = [latex_escape(title) for title in columns(frame).values()]
    numeric = [value.number for value in entries(frame.iloc[:1])[0]]
    body = [" & ".join(latex_escape(value.text) for value in row) + r" \\" for row in entries(frame)]
    spec = "".join("r" if number else "l" for number in numeric)
    top = ["% needs \\usepackage{booktabs}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule", " & ".join(head) + r" \\"]
    return "\n".join([*top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def to_parquet(frame: pd.DataFrame, path: Path) -> None:
    """All flat columns as Parquet.

    Raises:
        EnvironmentUnusable: without pyarrow.
    """
    import importlib.util

    if importlib.util.find_spec("pyarrow") is None:
        raise EnvironmentUnusable(
            "Parquet needs the package pyarrow, which is not installed\n"
            "  pip install 'ctxbench[parquet]', or export --to csv"
        )
    frame.drop(columns="series").to_parquet(path, engine="pyarrow", index=False)


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u00b1": r"$\pm$", "\u00b5": r"$\mu$", "\n": " ",
    "<": r"\textless{}", ">": r"\textgreater{}", "\u00d7": r"$\times$",
    **{look.glyph: "" for look in STATUSES.values() if not look.glyph.isascii()}, "\u2013": "--",
}  # fmt: skip


def latex_escape(text: str) -> str:
    """Make a text inert in LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text).strip()


def _markdown(text: str) -> str:
    escaped = "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text)
    return " ".join(escaped.split())
