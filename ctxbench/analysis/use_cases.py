"""The use-case recommendations of the source documents as rules: each is checked against formulas, rows and forecasts.

A rule names the methods it is about, quotes the recommendation, and has a check. Recommendations about what a model
learns (patterns, structure) say nothing about time and memory and are listed as not measured, not as true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ctxbench.analysis.advise import BOUNDED, GOOD, Advice
from ctxbench.analysis.forecast import MEASURED, Estimate, Forecaster
from ctxbench.analysis.reserve import PEAK_SHARE
from ctxbench.cost.figures import Evaluator
from ctxbench.plan import Planned
from ctxbench.units import format_bytes, format_seconds, format_tokens

HOLDS, VIOLATED, UNDECIDED, NOT_MEASURED = "holds", "violated", "undecided", "not measured"
LINEAR = (0.9, 1.1)  # slopes of log cost against log length that "roughly linear" admits
BASELINE = "dense"


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """A recommendation and what the data say of it; ``cells`` are the keys of the evidence."""

    about: str
    recommendation: str
    verdict: str
    evidence: str
    cells: list[str] = []


class Field:
    """What a rule may ask: the cells of the request, also in another mode, and their estimates."""

    def __init__(self, cells: Sequence[Planned], forecaster: Forecaster, advice: Advice):
        self.cells, self.forecaster, self.advice = cells, forecaster, advice
        self.evaluator = Evaluator()
        self.used: dict[str, None] = {}

    def of(self, method: str, mode: str | None = None) -> list[Planned]:
        """Supported cells of a method at its smallest memory size asked about, in the request's mode or another."""
        found = []
        for planned in self.cells:
            if planned.cell.method != method:
                continue
            cell = msgspec.structs.replace(planned.cell, mode=mode or planned.cell.mode)
            try:
                params = cell.params_for(planned.method)
                answer = planned.method.mode_support(cell.mode, cell.dims, params) and planned.method.impl_support(
                    planned.method.impl(cell.impl), cell.mode, cell.dims, params, cell.device, cell.dtype
                )
            except Exception:  # a plug-in's support may raise anything; the plan of its cell says so
                continue
            if answer:
                found.append(Planned(cell, planned.origin, planned.method))
        sizes = [planned.cell.memory or 0 for planned in found]
        return [planned for planned in found if (planned.cell.memory or 0) == min(sizes)]

    def fastest(self, method: str, mode: str | None = None) -> Estimate | None:
        """The estimate of a method's fastest impl; None where it has none here."""
        found = [self.forecaster.estimate(planned.cell) for planned in self.of(method, mode)]
        known = [estimate for estimate in found if estimate.latency_s is not None]
        return self._note(min(known, key=lambda each: each.latency_s or 0.0)) if known else None

    def leanest(self, method: str, mode: str | None = None) -> Estimate | None:
        """The estimate of a method's impl with the smallest peak; None where no peak is known."""
        found = [self.forecaster.estimate(planned.cell) for planned in self.of(method, mode)]
        known = [estimate for estimate in found if estimate.peak_bytes is not None]
        return self._note(min(known, key=lambda each: each.peak_bytes or 0)) if known else None

    def _note(self, found: Estimate) -> Estimate:
        self.used.update(dict.fromkeys(found.evidence))
        return found


Answer = tuple[str, str]
Check = Callable[[Field, Sequence[str]], Answer]


@dataclass(frozen=True)
class Rule:
    """A recommendation, the methods it is about, and its check; None where it says nothing about time or memory."""

    about: str
    recommendation: str
    methods: tuple[str, ...]
    check: Check | None


def judge(cells: Sequence[Planned], forecaster: Forecaster, advice: Advice) -> list[Judged]:
    """Every rule with its verdict at this request."""
    found = []
    for rule in RULES:
        field = Field(cells, forecaster, advice)
        known = [name for name in rule.methods if any(planned.cell.method == name for planned in cells)]
        if rule.check is None:
            verdict, evidence = NOT_MEASURED, "says nothing about time or memory"
        elif not known:
            verdict, evidence = UNDECIDED, f"not among the methods asked about: {', '.join(rule.methods)}"
        else:
            verdict, evidence = rule.check(field, known)
        found.append(
            Judged(
                about=rule.about, recommendation=rule.recommendation, verdict=verdict, evidence=evidence,
                cells=list(field.used),
            )
        )  # fmt: skip
    return found


def _all(parts: Sequence[tuple[bool | None, str]]) -> Answer:
    """Violated where one part is, undecided where one is unknown, else it holds."""
    answers = [answer for answer, _ in parts]
    text = "; ".join(text for _, text in parts)
    if False in answers:
        return VIOLATED, text
    return (UNDECIDED if None in answers else HOLDS), text


def bounded_streams(field: Field, methods: Sequence[str]) -> Answer:
    """Streams segment by segment with a state that does not grow."""
    parts: list[tuple[bool | None, str]] = []
    for method in methods:
        streams = field.of(method, "stream")
        growth = field.forecaster.state_growth(streams[0].cell) if streams else None
        size = field.forecaster.estimate(streams[0].cell).state_bytes if streams else None
        if not streams:
            parts.append((False, f"{method} has no stream mode here"))
        elif growth is None:
            parts.append((None, f"{method} declares no formula"))
        else:
            parts.append((growth in BOUNDED, f"{method} carries {format_bytes(size)}, {growth}"))
    return _all(parts)


def constant_memory(field: Field, methods: Sequence[str]) -> Answer:
    """State and peak of a stream stay where they are at four times the length, up to the meters' tolerance."""
    parts: list[tuple[bool | None, str]] = []
    for method in methods:
        found = field.leanest(method, "stream")
        chosen = next((p for p in field.of(method, "stream") if found is not None and p.cell.impl == found.impl), None)
        if found is None or chosen is None:
            parts.append((None, f"the peak of {method} as a stream is unknown"))
            continue
        longer = msgspec.structs.replace(chosen.cell, seq_len=4 * chosen.cell.seq_len)
        grown, growth = field.forecaster.estimate(longer).peak_bytes, field.forecaster.state_growth(chosen.cell)
        if grown is None or growth is None or not found.peak_bytes:
            parts.append((None, f"the growth of {method}'s memory is unknown"))
            continue
        times = grown / found.peak_bytes
        text = f"{method}: state {growth}, a stream four times as long peaks at {times:.3g} times the memory"
        parts.append((growth in BOUNDED and grown <= PEAK_SHARE * found.peak_bytes, text))
    return _all(parts)


def needs_more_memory(field: Field, methods: Sequence[str]) -> Answer:
    """Peak, with the state that comes in when decoding, above that of the dense baseline; each by its leanest impl."""
    base = _held(field.leanest(BASELINE))
    parts: list[tuple[bool | None, str]] = []
    for method in methods:
        own = _held(field.leanest(method))
        if base is None or own is None:
            parts.append((None, f"the peak of {method} or {BASELINE} is unknown"))
            continue
        parts.append((own > base, f"{method} takes {format_bytes(own)}, {BASELINE} {format_bytes(base)}"))
    return _all(parts)


def _held(found: Estimate | None) -> int | None:
    if found is None or found.peak_bytes is None:
        return None
    return found.peak_bytes + ((found.state_bytes or 0) if found.mode == "decode" else 0)


def linear_work(field: Field, methods: Sequence[str]) -> Answer:
    """FLOPs of a whole sequence grow with about the first power of the length here."""
    return _all([_slope(field, method, LINEAR[0]) for method in methods])


def no_more_than_linear(field: Field, methods: Sequence[str]) -> Answer:
    """FLOPs of a whole sequence grow with at most about the first power of the length here."""
    return _all([_slope(field, method, 0.0) for method in methods])


def _slope(field: Field, method: str, least: float) -> tuple[bool | None, str]:
    """Whether the slope of the impl that grows least lies between ``least`` and what "roughly linear" admits."""
    slopes = []
    for planned in field.of(method, "forward"):
        try:
            slope = field.evaluator.slope(planned.method, planned.cell)
        except Exception:  # a plug-in's formula may raise anything
            slope = None
        slopes += [slope] if slope is not None else []
    if not slopes:
        return None, f"{method} has no formula or no such form here"
    return least <= min(slopes) <= LINEAR[1], f"FLOPs of {method} T^{min(slopes):.2f}"


def fastest_of_all(field: Field, methods: Sequence[str]) -> Answer:
    """Within a tenth of the fastest admitted method; undecided where the intervals overlap."""
    if not field.advice.ranked:
        return UNDECIDED, "no method meets the request"
    first = field.advice.ranked[0]
    own = [candidate for candidate in field.advice.ranked if candidate.method in methods]
    if not own:
        return VIOLATED, f"refused here: {', '.join(methods)}"
    mine = own[0]
    time, best = mine.estimate.latency_s or 0.0, first.estimate.latency_s or 0.0
    field.used.update(dict.fromkeys([*mine.estimate.evidence, *first.estimate.evidence]))
    marks = ["" if candidate.estimate.source == MEASURED else " (forecast)" for candidate in (mine, first)]
    text = f"{mine.method} {format_seconds(time)}{marks[0]}"
    text += f", the fastest is {first.method} {format_seconds(best)}{marks[1]}"
    if time <= (1 + GOOD) * best:
        return HOLDS, text
    return (UNDECIDED if mine.tied else VIOLATED), text


def cheaper_than_dense(field: Field, methods: Sequence[str]) -> Answer:
    """Faster than the dense baseline, and no larger."""
    base = field.fastest(BASELINE)
    parts: list[tuple[bool | None, str]] = []
    for method in methods:
        own = field.fastest(method)
        if base is None or own is None or base.latency_s is None or own.latency_s is None:
            parts.append((None, f"the time of {method} or {BASELINE} is unknown"))
            continue
        text = f"{method} takes {own.latency_s / base.latency_s:.2g} times the time of {BASELINE}"
        clear = (own.high or 0.0) < (base.low or 0.0) or (own.low or 0.0) > (base.high or 0.0)
        faster = own.latency_s < base.latency_s
        parts.append((faster if clear else None, text + ("" if clear else ", intervals overlap")))
    return _all(parts)


def reaches_further_than_dense(field: Field, methods: Sequence[str]) -> Answer:
    """Cheaper than the dense baseline at this length, with work that grows with its first power."""
    verdicts = [check(field, methods) for check in (no_more_than_linear, cheaper_than_dense)]
    order = (VIOLATED, UNDECIDED, HOLDS)
    return min((verdict for verdict, _ in verdicts), key=order.index), "; ".join(text for _, text in verdicts)


MEMORY = ("memory_bank", "compressive_memory")
RECURRENT = ("transformer_xl", "segment_recurrent", "rmt")
HIERARCHICAL = ("hierarchical", "pyramid")
SPARSE = ("longformer", "bigbird", "routing")
RULES = (
    Rule("Memory-Augmented Transformers", "need to maintain long-term context", MEMORY, bounded_streams),
    Rule("Memory-Augmented Transformers", "document-level understanding", MEMORY, None),
    Rule("Memory-Augmented Transformers", "additional memory overhead", MEMORY, needs_more_memory),
    Rule("Recurrent Transformers", "streaming applications", RECURRENT, bounded_streams),
    Rule("Recurrent Transformers", "very long sequences", RECURRENT, reaches_further_than_dense),
    Rule("Recurrent Transformers", "constant memory usage", RECURRENT, constant_memory),
    Rule("Hierarchical Attention", "multi-scale patterns, document structure awareness", HIERARCHICAL, None),
    Rule("Hierarchical Attention", "implementation complexity", HIERARCHICAL, None),
    Rule("Longformer-Style", "good balance of efficiency and performance", ("longformer",), cheaper_than_dense),
    Rule("Longformer-Style", "local and global attention needs, document processing", ("longformer",), None),
    Rule("Trade-offs", "compute rises roughly linearly with the length, even for sparse methods", SPARSE, linear_work),
    Rule(
        "Recipe", "within a medium-long window (e.g. 100k tokens) go with BigBird or Longformer",
        ("bigbird", "longformer"), fastest_of_all,
    ),
    Rule(
        "Recipe", "for unbounded history use Transformer-XL or the Compressive Transformer",
        ("transformer_xl", "compressive_transformer"), bounded_streams,
    ),
    Rule("Hybrid local + state", "constant memory: one block and a small state", ("block_state",), constant_memory),
)  # fmt: skip


def summary(found: Sequence[Judged], length: int) -> str:
    """``at 100k tokens: holds 6, violated 2, ...``."""
    order = (HOLDS, VIOLATED, UNDECIDED, NOT_MEASURED)
    counts = [(verdict, sum(each.verdict == verdict for each in found)) for verdict in order]
    return f"at {format_tokens(length)} tokens: " + ", ".join(
        f"{verdict} {count}" for verdict, count in counts if count
    )
