"""What an audit says: one verdict a declared term, with what was claimed, what was seen, and the evidence.

``analysis.audit_method`` judges a method without a run, ``analysis.audit_rows`` judges what a run measured, and
``analysis.audit_table`` judges the complexity table of the source documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from ctxbench.analysis.slopes import local_slopes
from ctxbench.units import format_tokens

HOLDS, VIOLATED, NOT_CLAIMED, NOT_APPLICABLE = "holds", "violated", "not claimed", "not applicable"
FAILS = "fails"  # what a literal sketch claims of a probe that it declares as a defect
VERDICTS = (HOLDS, VIOLATED, NOT_CLAIMED, NOT_APPLICABLE)

FLOPS_GROWTH, PEAK_GROWTH, TIME_GROWTH = "growth of FLOPs", "growth of peak memory", "growth of time"
PEAK_SHARE = 0.03  # a peak may differ from its formula by so much: padding, rounding of blocks
PEAK_SLACK = 2 << 20  # bytes; the same for meters that see the allocator's own bookkeeping
MARGIN = 0.1  # of a slope of exact counts: what lower terms may add before the declared growth is reached


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One declared term of one impl. ``mode`` is empty where the term holds for all modes together."""

    method: str
    impl: str
    term: str
    verdict: str
    mode: str = ""
    claimed: str = ""
    seen: str = ""
    evidence: str = ""

    @property
    def ok(self) -> bool:
        """Whether the claim is not contradicted."""
        return self.verdict != VIOLATED


def violated(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The contradicted claims."""
    return [verdict for verdict in verdicts if not verdict.ok]


def slope_at_end(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value against log length between the two longest lengths; NaN where there are no two above 0."""
    points = [(n, value) for n, value in sorted(zip(lengths, values, strict=True)) if value > 0]
    if len(points) < 2:
        return math.nan
    (first, low), (last, high) = points[-2:]
    return local_slopes([first, last], [low, high])[0].value


def judge_growth(lengths: Sequence[int], seen: Sequence[float], declared: Sequence[float], limit: float) -> tuple[
    str, str, str, str,
]:  # fmt: skip
    """Verdict, claimed, seen and evidence of one growth.

    What was seen may grow as the formula does between the same two lengths, or as its highest power: whichever is
    faster. A big-O is an upper bound, so growing more slowly contradicts nothing.

    Args:
        lengths: tokens, increasing.
        seen: what was counted or measured at each length.
        declared: the formula's value at each length.
        limit: the formula's slope where lower terms have vanished.
    """
    found, formula = slope_at_end(lengths, seen), slope_at_end(lengths, declared)
    if math.isnan(found):
        return NOT_APPLICABLE, "", "", "fewer than two lengths with a count above 0"
    bound = max(limit, 0.0 if math.isnan(formula) else formula)
    first, last = (format_tokens(n) for n in sorted(lengths)[-2:])
    claimed, shown = f"T^{bound:.2f} at most", f"T^{found:.2f}"
    low, high = (f"{value:,}" for _, value in sorted(zip(lengths, seen, strict=True))[-2:])
    evidence = f"{low} at {first}, {high} at {last}"
    return (HOLDS if found <= bound + MARGIN else VIOLATED), claimed, shown, evidence
