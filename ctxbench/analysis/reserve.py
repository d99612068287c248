"""Peak memory of a cell nobody measured: the likely bytes, and what to reserve so that nothing is said to fit wrongly.

A formula knows the allocator's peak. Past the allocator, libraries take scratch of their own: MKL packs the operands
of a product into buffers of its own, a set a thread, once these are large enough, so that a series may show none of it
at three lengths and begin at the fourth. What the resident meter saw in the other series of the run bounds that.

Without a formula, measured lengths answer. A peak is the largest of a few sums of what lives together, each a
polynomial of the length with no negative term: its slope on logarithmic axes never falls. So the last slope shown is
the least, and what an impl's fastest growing product grows by is the most, because a tensor that grows faster than
every product has nobody to fill it. An impl that declares no formula at all may grow with the square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ctxbench.rows import Row

PEAK_SHARE, PEAK_SLACK = 1.03, 2 << 20  # a peak within these of its formula counts as equal to it
SCRATCH_SHARE = 1.15  # what to reserve besides where fewer than SCRATCH_LENGTHS lengths have shown what libraries take
SCRATCH_LENGTHS = 2
LONG_RECORD_S = 2.0  # a resident peak of a longer call may hold the record that another meter made of it meanwhile
WORST_GROWTH = 2  # power of the length by which a peak without formulas may grow
SAME_PRODUCTS = 1.05  # FLOPs a token that grow by less belong to products of one size, of which there are more

Growth = Callable[[int, int], float | None]
"""How many times the fastest growing product of a longer length is that of a shorter; None where nothing is known."""


def needed(row: Row) -> int | None:
    """Bytes of the peak by the higher of both meters, where the resident one watched a call of its own."""
    peak = row.peak_bytes
    if peak is None or not peak.allocated:
        return None
    return peak.allocated if shared(row) else max(peak.allocated, peak.resident or 0)


def shared(row: Row) -> bool:
    """Whether both meters watched one long call: the resident one counts what the allocator's took to record it.

    The run decided by what it knew of the call before all processes had ended.
    """
    return row.latency_s is not None and row.latency_s.median > 0.9 * LONG_RECORD_S


def scratch(rows: Mapping[int, Row]) -> list[int]:
    """What the resident meter saw above the allocator's at the lengths of a series, the shortest first."""
    found = []
    for _, row in sorted(rows.items()):
        peak = row.peak_bytes
        if peak and peak.allocated and peak.resident and not shared(row):
            found.append(peak.resident - peak.allocated)
    return found


def common_scratch(series: Iterable[Mapping[int, Row]]) -> int:
    """The most that libraries take past the allocator in any series of a run, by its longest two lengths."""
    return max((above for rows in series for above in scratch(rows)[-SCRATCH_LENGTHS:]), default=0)


def by_formula(
    seq_len: int, formula: int, rows: Mapping[int, Row], expected: Mapping[int, int | None], growth: Growth, common: int
) -> tuple[int, int]:
    """The likely peak and one to reserve.

    Likely is the formula, raised by the share by which any finished length exceeded it. What to reserve adds the
    meters' tolerance, and in proportion to the length what libraries took here at the longest two lengths; where
    products grow with the length, at least what they took elsewhere in the run. Where fewer lengths have shown that, it
    may begin at this one, and a share is added for it.

    Args:
        seq_len: the length asked about.
        formula: its peak by formula.
        rows: the measured lengths of its series that have a peak.
        expected: the formula at each of these.
        growth: see ``Growth``.
        common: see ``common_scratch``.
    """
    shares = [1.0]
    for length, row in rows.items():
        assert row.peak_bytes is not None
        if each := expected[length]:
            shares.append((row.peak_bytes.allocated or 0) / each)
    likely = formula * max(shares)
    return int(likely), int(_reserved(likely, seq_len, rows, growth, common))


def by_lengths(seq_len: int, rows: Mapping[int, Row], growth: Growth, common: int) -> tuple[int, int] | None:
    """The same from measured lengths alone; None where no shorter one has a peak."""
    peaks = {n: float(row.peak_bytes.allocated or 0) for n, row in sorted(rows.items()) if row.peak_bytes}
    shorter = [length for length in peaks if length < seq_len]
    if not shorter:
        return None
    last, times = shorter[-1], seq_len / shorter[-1]
    least = peaks[last] * times ** _slope(peaks, shorter[-2:])
    known = growth(last, seq_len)
    most = times**WORST_GROWTH if known is None else max(known, times)
    return int(least), int(_reserved(max(least, peaks[last] * most), seq_len, rows, growth, common))


def _slope(peaks: Mapping[int, float], lengths: Sequence[int]) -> float:
    """Of the peak over the last two lengths, at least 0; proportional where there is one."""
    if len(lengths) < SCRATCH_LENGTHS:
        return 1.0
    before, last = lengths
    return max(0.0, math.log(peaks[last] / peaks[before]) / math.log(last / before))


def _reserved(peak: float, seq_len: int, rows: Mapping[int, Row], growth: Growth, common: int) -> float:
    """Bytes to reserve for a peak of the allocator."""
    above, last = scratch(rows), max(rows, default=seq_len)
    times = max(1.0, seq_len / last)
    own = max(0, *above[-SCRATCH_LENGTHS:], 0)
    if len(above) < SCRATCH_LENGTHS:
        return peak * SCRATCH_SHARE + PEAK_SLACK + own * times
    tolerated = max(peak * PEAK_SHARE, peak + PEAK_SLACK)
    known = growth(last, seq_len) if last < seq_len else 1.0
    if known is not None and known <= SAME_PRODUCTS * times:
        return tolerated + own
    return max(tolerated + own * times, peak + common)
