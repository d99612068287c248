"""Three sentences written from the data: who is fastest, who stops where and why, does the cost grow as predicted."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ctxbench.analysis.frame import MEASURED, SKETCH, fastest
from ctxbench.analysis.slopes import trend, work_basis
from ctxbench.reports.figures import scales
from ctxbench.reports.palette import status_of
from ctxbench.units import format_tokens

CLOSE = 0.15  # slopes nearer to each other than this are called equal


def sentences(view: pd.DataFrame) -> list[str]:
    """At most three sentences about one view; each is left out where the data do not carry it."""
    measured = view[view["status"].isin(MEASURED) & (view["latency_s"] > 0)]
    if measured.empty:
        return ["No cell of this run was measured; the table says why for each of them."]
    if (measured["impl"] != SKETCH).any():
        measured = measured[measured["impl"] != SKETCH]
    return [text for text in (_fastest(view, measured), _reach(view, measured), _growth(view, measured)) if text]


def common_length(measured: pd.DataFrame) -> int:
    """The longest length that the most methods completed."""
    methods = measured.groupby("seq_len")["method"].nunique()
    return int(methods[methods == methods.max()].index.max())


def _fastest(view: pd.DataFrame, measured: pd.DataFrame) -> str:
    length = common_length(measured)
    here = measured[measured["seq_len"] == length].sort_values("latency_s")
    best = here.loc[here.groupby("method")["latency_s"].idxmin()].sort_values("latency_s")
    count, total = len(best), view["method"].nunique()
    who = (
        "the only method"
        if total == 1
        else ("both methods" if total == 2 else f"all {total} methods")
        if count == total
        else f"{count} of {total} methods"
    )
    at = f"At {format_tokens(length)} tokens, the longest length that {who} completed,"
    first = best.iloc[0]
    text = f"{at} {first['series']} takes {scales.text(first['latency_s'], 's')} a call"
    if count == 1:
        return text + "."
    second, last = best.iloc[1], best.iloc[-1]
    if first["latency_high_s"] >= second["latency_low_s"]:
        text += f" and cannot be told from {second['series']}: their intervals overlap"
    else:
        text += f" and is the fastest, {second['latency_s'] / first['latency_s']:.3g} times ahead of {second['series']}"
    if count > 2:
        text += f"; {last['series']} takes {last['latency_s'] / first['latency_s']:.3g} times as long"
    return text + "."


def _reach(view: pd.DataFrame, measured: pd.DataFrame) -> str:
    planned = view.groupby("method")["seq_len"].max()
    reached = measured.groupby("method")["seq_len"].max()
    complete = [str(method) for method, length in reached.items() if length == planned[str(method)]]
    longest = format_tokens(int(planned.max())) + " tokens" if planned.nunique() == 1 else "their longest length"
    furthest = measured.sort_values("seq_len").groupby("method")["series"].last()
    stops: dict[tuple[int, str], list[str]] = {}  # by the length after which, and why
    for method in sorted(view["method"].unique(), key=lambda name: (-int(reached.get(name, 0)), name)):
        if method in complete:
            continue
        rows = view[(view["series"] == furthest.get(method, "")) & (view["seq_len"] > reached.get(method, 0))]
        rows = rows if len(rows) else view[(view["method"] == method) & (view["seq_len"] > reached.get(method, 0))]
        first = rows.sort_values("seq_len", kind="stable").iloc[0]
        reason = _brief(first["reason"]).partition("; forecast")[0]
        why = status_of(first["status"]).words + (f", {reason}" if reason else "")
        stops.setdefault((int(reached.get(method, 0)), why), []).append(str(method))
    if not stops:
        return f"Every method reaches {'the longest length, ' if planned.nunique() == 1 else ''}{longest}."
    start = f"{_list(complete)} reach{'es' if len(complete) == 1 else ''}" if complete else "No method reaches"
    texts = [f"{_list(names)} {f'after {format_tokens(length)}' if length else 'before the first length'} ({why})"
             for (length, why), names in stops.items()]  # fmt: skip
    more = f"; and {sum(map(len, list(stops.values())[4:]))} more" if len(texts) > 4 else ""
    return f"{start} {longest}; measurements stop for {'; for '.join(texts[:4])}{more}."


def _growth(view: pd.DataFrame, measured: pd.DataFrame) -> str:
    gaps: list[tuple[float, str, float, float, int, int]] = []
    for series in fastest(view).values():
        rows = measured[measured["series"] == series].sort_values("seq_len")
        basis = work_basis(rows)
        rows = rows[rows[basis].notna() & (rows[basis] > 0).fillna(False)]
        lengths = [int(length) for length in rows["seq_len"]]
        seen = trend(lengths, [float(value) for value in rows["latency_s"]])
        said = trend(lengths, [float(value) for value in rows[basis]])
        if seen and said:
            gaps.append((abs(seen.value - said.value), series, seen.value, said.value, lengths[0], lengths[-1]))
    if not gaps:
        return ""
    gap, series, seen_slope, said_slope, first, last = max(gaps)
    if gap <= CLOSE and len(gaps) > 1:
        return (f"Measured time grows as the formulas say for all {len(gaps)} methods that can be compared: "
                f"the largest difference of slopes is {gap:.2f} ({series}).")  # fmt: skip
    close = sum(other[0] <= CLOSE for other in gaps)
    start = f"Measured time grows as the formula says (slopes within {CLOSE}) for {close} of {len(gaps)} methods; "
    span = f"between {format_tokens(first)} and {format_tokens(last)}"
    return (f"{start if len(gaps) > 1 else ''}{'the largest gap is' if len(gaps) > 1 else 'Measured time of'} {series}"
            f"{', whose time' if len(gaps) > 1 else ''} grows with slope {seen_slope:.2f} {span} "
            f"where its formula says {said_slope:.2f}.")  # fmt: skip


def counts(frame: pd.DataFrame) -> Mapping[str, int]:
    """Rows by status, in the order of the statuses, present ones only."""
    found = frame["status"].value_counts()
    return {str(status): int(found[status]) for status in sorted(found.index, key=_order)}


def _order(status: str) -> tuple[int, str]:
    from ctxbench.rows import STATUSES

    return (STATUSES.index(status) if status in STATUSES else len(STATUSES), status)


def _brief(reason: str) -> str:
    line = reason.strip().splitlines()[0] if reason.strip() else ""
    return line if len(line) <= 90 else line[:88].rstrip() + " \u2026"


def _list(names: list[str]) -> str:
    if len(names) > 5:
        return f"{', '.join(names[:4])} and {len(names) - 4} more methods"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
