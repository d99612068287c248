"""What one token costs after a context, and what is kept of the context: flat, linear, or in between.

Of rows in mode ``decode`` (one token after T) and ``stream`` (T tokens, a segment at a time). Bytes are counts, so
their growth is told from the two longest lengths without any doubt; time is judged by the interval of its exponent over
the last lengths.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ctxbench.analysis.processes import processes
from ctxbench.analysis.scaling import Curve, Slope, power, work_of
from ctxbench.cost import big_o
from ctxbench.method import Method
from ctxbench.registry import Registry
from ctxbench.rows import Row, cell_of
from ctxbench.units import format_tokens

MODES = ("decode", "stream")
NEAR = 0.25  # an exponent closer to 0 or 1 than to the next half power
FLAT, LINEAR = "flat", "linear"


class Carried(msgspec.Struct, frozen=True, kw_only=True):
    """One series. ``token_s``, ``state_bytes`` and ``peak_bytes`` stand beside ``lengths``; None where unknown.

    ``time`` is the exponent of the time of one token in the length. ``state_order`` is how the state grows in the end
    by the method's formula, as in ``O(1)``: a memory may be longer than the lengths measured. Empty without a formula.
    """

    method: str
    impl: str
    mode: str
    device: str
    dtype: str
    memory: int | None
    params: dict[str, Any]
    lengths: list[int]
    token_s: list[float]
    state_bytes: list[int | None]
    peak_bytes: list[int | None]
    time: Slope
    state_order: str = ""

    @property
    def time_text(self) -> str:
        """``flat: T^0.01 (-0.02 to 0.04)``; without a word where the interval is not near 0 or 1."""
        word = verdict(self.time)
        return f"{word}: {power(self.time)}" if word else power(self.time)

    @property
    def state_text(self) -> str:
        """How the state grows between the lengths measured, and in the end: ``T^0.49, in the end O(1)``."""
        seen = growth(self.lengths, self.state_bytes)
        expected = {"O(1)": FLAT, "O(T)": LINEAR}.get(self.state_order, "")
        return seen if not seen or seen.startswith(expected) else f"{seen}, in the end {self.state_order}"

    @property
    def peak_text(self) -> str:
        """How the peak of a call grows."""
        return growth(self.lengths, self.peak_bytes)


def columns(series: Sequence[Carried], most: int = 4) -> list[int]:
    """Lengths for a table: the first and the last that any series has, and some between them."""
    lengths = sorted({length for each in series for length in each.lengths})
    if len(lengths) <= most:
        return lengths
    return [lengths[round(index * (len(lengths) - 1) / (most - 1))] for index in range(most)]


def verdict(slope: Slope) -> str:
    """``linear`` where the whole interval is near 1, ``flat`` where all of it is below growth; else nothing.

    A token cannot become cheaper with the context: how far an interval reaches below 0 says how noisy the machine was.
    """
    low = slope.value if slope.low is None else slope.low
    high = slope.value if slope.high is None else slope.high
    if high <= NEAR and abs(slope.value) <= NEAR:
        return FLAT
    return LINEAR if low >= 1 - NEAR and high <= 1 + NEAR else ""


def growth(lengths: Sequence[int], counts: Sequence[int | None]) -> str:
    """``flat``, ``flat from 4k``, ``linear``, or the exponent between the two longest lengths; empty for fewer."""
    known = [(length, count) for length, count in zip(lengths, counts, strict=True) if count is not None]
    if len(known) < 2:
        return ""
    (before, less), (last, most) = known[-2:]
    if most == less:
        first = next(length for length, count in known if count == most)
        return FLAT if first == known[0][0] else f"{FLAT} from {format_tokens(first)}"
    if not less or not most:
        return ""
    exponent = math.log(most / less) / math.log(last / before)
    return LINEAR if abs(exponent - 1) < NEAR / 4 else f"T^{exponent:.2f}"


def carried(rows: Iterable[Row], registry: Registry | None = None) -> list[Carried]:
    """Every series in a mode with a state with at least two measured lengths, in the order of the rows.

    The registry knows the formulas of what is installed.
    """
    found: dict[Any, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.mode in MODES and row.measured and len(processes(row).medians):
            found[cell_of(row).series][row.seq_len] = row
    curves = [[series[length] for length in sorted(series)] for series in found.values() if len(series) >= 2]
    return [_carried(rows, registry.get(rows[0].method) if registry else None) for rows in curves]


def _carried(rows: Sequence[Row], method: Method | None) -> Carried:
    first, lengths = rows[0], [row.seq_len for row in rows]
    share = [1 if first.mode == "decode" else length for length in lengths]  # tokens a call
    seconds = [processes(row).medians / tokens for row, tokens in zip(rows, share, strict=True)]
    flops = [work_of(row) for row in rows]
    work = [flop / tokens for flop, tokens in zip(flops, share, strict=True) if flop]
    curve = Curve(lengths, seconds, work if len(work) == len(rows) else None)
    return Carried(
        method=first.method, impl=first.impl, mode=first.mode, device=first.device, dtype=first.dtype,
        memory=first.memory, params=first.params, lengths=lengths,
        token_s=[row.latency_s.median / tokens for row, tokens in zip(rows, share, strict=True) if row.latency_s],
        state_bytes=[_state(row) for row in rows],
        peak_bytes=[row.peak_bytes.allocated if row.peak_bytes else None for row in rows],
        time=curve.tail(), state_order=_order(first, method),
    )  # fmt: skip


def _order(row: Row, method: Method | None) -> str:
    """Growth of the state by formula; empty where the method is not installed, has none, or has other parameters."""
    if method is None or all(impl.name != row.impl for impl in method.impls):
        return ""
    try:
        params = method.params().replace(**row.params)
        cost = method.cost_of(row.impl, row.mode, row.causal, row.position, params)
        return "" if cost is None else big_o(cost.state_bytes)
    except Exception:  # a plug-in's own code
        return ""


def _state(row: Row) -> int | None:
    """Bytes of state as measured, else by formula."""
    state = row.state_bytes
    return None if state is None else state.formula if state.measured is None else state.measured
