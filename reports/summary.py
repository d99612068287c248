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
    first, layers = best.iloc[0], best["num_layers"].mode().iloc[0]
    text = f"{at} {first['series']}{_depth(first, layers)} takes {scales.text(first['latency_s'], 's')} a call"
    if count == 1:
        return text + "."
    second, last = best.iloc[1], best.iloc[-1]
    if first["latency_high_s"] >= second["latency_low_s"]:
        text += f" and cannot be told from {second['series']}: their intervals overlap"
    else:
        times = second["latency_s"] / first["latency_s"]
        text += f" and is the fastest; the next, {second['series']}{_depth(second, layers)}, "
        text += f"takes {times:.3g} times as long"
    if count > 2:
        times = last["latency_s"] / first["latency_s"]
        text += (
            f"{',' if 'next' in text else ';'} the slowest, {last['series']}{_depth(last, layers)}, {times:.3g} times"
        )
    return text + (". Each method stands here with its fastest impl." if view["impl"].nunique() > 1 else ".")


def _depth(row: pd.Series, usual: int) -> str:
    """A method that cannot have as few layers as the others says so beside its time."""
    return "" if row["num_layers"] == usual else f" with {row['num_layers']} layers"


def _reach(view: pd.DataFrame, measured: pd.DataFrame) -> str:
    planned = view.groupby("method")["seq_len"].max()
    reached = measured.groupby("method")["seq_len"].max()
    complete = [str(method) for method, length in reached.items() if length == planned[str(method)]]
    longest = format_tokens(int(planned.max())) + " tokens" if planned.nunique() == 1 else "their longest length"
    furthest = measured.sort_values("seq_len").groupby("method")["series"].last()
    stops: dict[str, dict[int, list[str]]] = {}  # by the reason, and the length after which
    for method in sorted(view["method"].unique(), key=lambda name: (-int(reached.get(name, 0)), name)):
        if method in complete:
            continue
        rows = view[(view["series"] == furthest.get(method, "")) & (view["seq_len"] > reached.get(method, 0))]
        rows = rows if len(rows) else view[(view["method"] == method) & (view["seq_len"] > reached.get(method, 0))]
        first = rows.sort_values("seq_len", kind="stable").iloc[0]
        reason = _brief(first["reason"]).partition("; forecast")[0]
        why = status_of(first["status"]).words + (f", {reason}" if reason else "")
        stops.setdefault(why, {}).setdefault(int(reached.get(method, 0)), []).append(str(method))
    if not stops:
        return f"Every method reaches {'the longest length, ' if planned.nunique() == 1 else ''}{longest}."
    start = f"{_names(complete)} reach{'es' if len(complete) == 1 else ''}" if complete else "No method reaches"
    texts = [f"for {_list([_stop(names, length) for length, names in found.items()])} ({why})"
             for why, found in stops.items()]  # fmt: skip
    rest = sum(len(names) for found in list(stops.values())[4:] for names in found.values())
    return f"{start} {longest}; measurements end {'; '.join(texts[:4])}{f'; and for {rest} more' if rest else ''}."


def _stop(names: list[str], length: int) -> str:
    who = _list(names) if len(names) < 4 else f"{len(names)} methods"
    return f"{who} {f'after {format_tokens(length)}' if length else 'before the first length'}"


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
    _, series, seen_slope, said_slope, first, last = max(gaps)
    span = f"between {format_tokens(first)} and {format_tokens(last)}"
    numbers = f"time grows like length to the power {seen_slope:.2f} {span}, its formula says {said_slope:.2f}"
    if len(gaps) == 1:
        return f"{series}'s {numbers}."
    close = sum(other[0] <= CLOSE for other in gaps)
    who = f"all {len(gaps)}" if close == len(gaps) else f"{close} of {len(gaps)}"
    return (f"Measured time grows as the formula says for {who} methods (exponents within {CLOSE}); "
            f"the largest gap is {series}, whose {numbers}.")  # fmt: skip


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


def _names(names: list[str]) -> str:
    """All of a few names, or the first of many."""
    return f"{', '.join(names[:4])} and {len(names) - 4} more methods" if len(names) > 5 else _list(names)


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
