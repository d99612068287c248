"""Two runs, cell by cell: overlaid curves, ratios with intervals, a verdict each."""

from __future__ import annotations

from typing import Any

from ctxbench.analysis.compare import Compared, Comparison, Side, Verdict, compare
from ctxbench.errors import UserError
from ctxbench.reports.figures import scales, versus
from ctxbench.reports.report import Report
from ctxbench.reports.swatch import legend
from ctxbench.units import counted, format_tokens

ORDER = (Verdict.SLOWER, Verdict.FASTER, Verdict.UNCLEAR, Verdict.SAME, Verdict.INVALID)
TONES = {Verdict.FASTER: "good", Verdict.SLOWER: "bad", Verdict.UNCLEAR: "fair", Verdict.SAME: "", Verdict.INVALID: ""}
HEAD = ("method, impl", "tokens", "A", "B", "B / A", "interval", "p (Holm)", "floor", "verdict", "why")


def wanted(report: Report) -> bool:
    """Whether there are two runs to hold against each other."""
    return len(report.runs) == 2


def context(report: Report) -> dict[str, Any]:
    """What ``compare.j2`` prints: where the runs cannot be compared, the reason alone."""
    a, b = report.runs
    try:
        found = compare(Side(a), Side(b), normalise=True)
    except UserError as error:
        return {"trouble": str(error), "a": a.name, "b": b.name}
    table = versus.data(found.cells, report.series_of.__getitem__)
    shown = set(table["series"]) & report.shown(report.views[0]) or set(table["series"])
    charts = [
        report.chart("versus-times", f"Time per call in {a.name} (A) and {b.name} (B)",
                     versus.curves(table, report.looks, shown),
                     lambda: versus.static(table, report.looks, shown, ratio=False)),
        report.chart("versus-ratio", "Ratio of B to A with its interval",
                     versus.interactive(table, report.looks, shown),
                     lambda: versus.static(table, report.looks, shown)),
    ] if len(table) else []  # fmt: skip
    cells = sorted(found.cells, key=lambda cell: (ORDER.index(cell.verdict), cell.method, cell.impl, cell.seq_len))
    return {
        "trouble": "", "a": found.a, "b": found.b, "charts": charts, "head": HEAD,
        "notes": [note.split("`") for note in found.notes],
        "counts": [(versus.MARKS[Verdict(name)], name, count, TONES[Verdict(name)])
                   for name, count in found.counts().items()],
        "sentence": _sentence(found), "lines": [_line(cell) for cell in cells],
        "legend": legend(report.frame, report.styles, report.looks, shown),
        "lonely": [
            (side, f"{counted(len(cells), 'cell')} {'is' if len(cells) == 1 else 'are'}")
            for side, cells in (("A", found.only_a), ("B", found.only_b)) if cells
        ],
    }  # fmt: skip


def _line(cell: Compared) -> dict[str, Any]:
    bounds = "" if cell.low is None or cell.high is None else f"{_times(cell.low)} to {_times(cell.high)}"
    texts = (
        versus.label(cell), format_tokens(cell.seq_len),
        *("" if value is None else scales.text(value, "s") for value in (cell.a_s, cell.b_s)),
        "" if cell.ratio is None else f"{_times(cell.ratio)} \u00d7", bounds,
        "" if cell.p_holm is None else f"{cell.p_holm:.2g}", "" if cell.floor is None else f"{100 * cell.floor:.1f} %",
    )  # fmt: skip
    return {"texts": texts, "verdict": str(cell.verdict), "mark": versus.MARKS[cell.verdict],
            "tone": TONES[cell.verdict], "reason": cell.reason.replace("+-", "\u00b1")}  # fmt: skip


def _times(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.3g}"


def _sentence(found: Comparison) -> str:
    counts = found.counts()
    parts = [f"{count} {name}" for name, count in counts.items()]
    text = f"Of {counted(len(found.cells), 'cell')} that both runs have, B is {', '.join(parts)}."
    broken = found.broken()
    return text + (f" {counted(len(broken), 'cell')} that A measured failed in B." if broken else "")
