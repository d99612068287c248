"""The audit of a method without a run: the answers of the conformance laws, and traces at ordinary sizes.

Both come in as plain values, because tracing needs torch and this package does not: ``findings`` from
``ctxbench.testing.check_method``, ``trace`` from ``ctxbench.cost.trace``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from msgspec.structs import replace
from sympy import Expr

from ctxbench.analysis.audit import (
    FLOPS_GROWTH,
    HOLDS,
    NOT_APPLICABLE,
    NOT_CLAIMED,
    PEAK_GROWTH,
    PEAK_SHARE,
    VIOLATED,
    Verdict,
    judge_growth,
)  # fmt: skip
from ctxbench.analysis.slopes import local_slopes
from ctxbench.cost import symbols
from ctxbench.cost.model import Cost, big_o, evaluate, local_slope, text, total
from ctxbench.errors import CtxbenchError
from ctxbench.method import DTYPE_BYTES, Dims, Method, Params
from ctxbench.units import format_tokens

ORDINARY = Dims(seq_len=1, batch_size=1, d_model=128, num_heads=4, num_layers=1, d_ff=512)
LENGTHS = (2048, 4096, 8192)
LITERAL = (1024, 2048)  # literal sketches may loop over tokens in Python
FAR = 10**15  # tokens at which the highest power of a formula is all that is left of it
LONGEST = 60  # characters of a formula in a table

# Which laws answer for a term; a law that is named nowhere is a term of its own.
TERMS: dict[str, tuple[str, ...]] = {
    "FLOPs": ("flops_equal_formula",),
    "countable operators": ("flops_are_seen",),
    "algorithmic FLOPs": ("algorithmic_flops_agree",),
    "peak memory": ("peak_equals_formula",),
    "state bytes": ("state_bytes_equal_formula",),
    "parameters": ("parameters_equal_formula",),
    "causality": ("causality",),
    "receptive field": ("receptive_field",),
    "batch independence": ("batch_independence",),
    "state and streaming": ("streaming_equals_whole", "state_shapes", "decode_continues"),
    "determinism": ("determinism",),
    "no side effects": ("purity",),
    "gradients": ("gradients_reach_everything", "gradcheck", "two_training_steps"),
    "shapes": ("shape_and_dtype", "any_length", "non_contiguous_input"),
    "agreement of impls": ("agreement",),
    "equivalences": ("equivalences",),
    "declared defects": ("declared_defects",),
}


class Finding(Protocol):
    """What is read of the answer of one law on one case: ``METHOD/IMPL`` or ``METHOD/IMPL/FORM``."""

    @property
    def law(self) -> str: ...
    @property
    def case(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def message(self) -> str: ...


class Trace(Protocol):
    """What is read of a trace."""

    flops: int
    peak_bytes: int
    num_parameters: int
    untraceable: str


Tracer = Callable[[Method, Dims, Params, str], Trace]


def audit_method(method: Method, findings: Sequence[Finding], trace: Tracer, impl: str | None = None) -> list[Verdict]:
    """Every declared term of every impl, or of one, with its verdict."""
    broken = [finding for finding in findings if "/" not in finding.case]
    if broken:  # the description itself raised: there is no case to try a law on
        start = {"method": method.name, "impl": impl or "", "verdict": VIOLATED}
        return [Verdict(term=finding.law, evidence=finding.message, **start) for finding in broken]
    found: list[Verdict] = []
    for name in [impl] if impl else [each.name for each in method.impls]:
        mine = [finding for finding in findings if (finding.case + "/").startswith(f"{method.name}/{name}/")]
        sizes = _Sizes(method, name, trace)
        verdicts = [_from_laws(method, name, term, laws, mine) for term, laws in _terms(mine).items()]
        found += [sizes.supplement(verdict) for verdict in verdicts] + sizes.growth()
    return found


def _terms(findings: Sequence[Finding]) -> dict[str, tuple[str, ...]]:
    answered = dict.fromkeys(finding.law for finding in findings)
    known = {law for laws in TERMS.values() for law in laws}
    return {
        **{term: laws for term, laws in TERMS.items() if answered.keys() & set(laws)},
        **{law: (law,) for law in answered if law not in known},
    }


def _from_laws(method: Method, impl: str, term: str, laws: Sequence[str], findings: Sequence[Finding]) -> Verdict:
    """A term is violated where one case of one law is, and holds where at least one does and none is violated."""
    mine = [finding for finding in findings if finding.law in laws]
    order = {"violated": VIOLATED, "held": HOLDS, "not claimed": NOT_CLAIMED, "not applicable": NOT_APPLICABLE}
    status = next(status for status in order if any(finding.status == status for finding in mine))
    chosen, verdict = [finding for finding in mine if finding.status == status], order[status]
    if verdict == HOLDS:
        laws_held = ", ".join(dict.fromkeys(finding.law for finding in chosen))
        asked = sum(finding.status != "not applicable" for finding in mine)
        evidence, seen = f"{laws_held}: held in {len(chosen)} of {asked} cases", ""
    else:
        evidence = f"{chosen[0].case}: {chosen[0].message}" if verdict == VIOLATED else chosen[0].message
        seen = f"{len(chosen)} of {len(mine)} cases" if verdict == VIOLATED else ""
    return Verdict(method=method.name, impl=impl, term=term, verdict=verdict, seen=seen, evidence=evidence)


class _Sizes:
    """Traces and formulas of one impl at ordinary sizes, where a temporary shows that tiny cases hide."""

    def __init__(self, method: Method, impl: str, trace: Tracer):
        self.method, self.impl = method, impl
        self.params = method.params()
        self.cost: Cost | None = None
        self.points: dict[int, Trace] = {}
        self.trouble, self.without = "", NOT_APPLICABLE  # why there is no growth to judge
        try:  # support, cost and build are the plug-in's own code
            self._look(trace)
            self._formulas()
        except Exception as error:
            self.cost = None
            if isinstance(error, CtxbenchError):  # a formula without an integer value, or over unknown letters
                self.without = VIOLATED
            self.trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    def _look(self, trace: Tracer) -> None:
        method, params = self.method, self.params
        causal = method.causal[0] if method.causal else True
        position, layers = method.positions[0], max(1, method.fewest_layers(params))
        self.dims = ORDINARY.replace(causal=causal, position=position, num_layers=layers)
        self.cost = method.cost_of(self.impl, "forward", causal, position, params)
        chosen = method.impl(self.impl)
        for length in LITERAL if chosen.defects else LENGTHS:
            dims = self.dims.replace(seq_len=length)
            answer = method.mode_support("forward", dims, params)
            answer = answer and method.impl_support(chosen, "forward", dims, params, "cpu", "fp32")
            if not answer:
                self.trouble = answer.reason
                continue
            point = trace(method, dims, params, self.impl)
            if point.untraceable:
                self.trouble = f"cannot be traced: {point.untraceable}"
                return
            self.points[length] = point

    def _formulas(self) -> None:
        """Evaluate every formula once, so that one without a value is met here."""
        for length in self.points if self.cost else ():
            assert self.cost is not None
            optional = () if self.cost.peak_bytes is None else (self.cost.peak_bytes,)
            for formula in (*self.cost.flops.values(), self.cost.num_parameters, self.cost.state_bytes, *optional):
                self.value(formula, length)

    def value(self, formula: Expr, length: int) -> int:
        return evaluate(formula, self._values(length))

    def _values(self, length: int) -> dict[str, Any]:
        dims, segment = self.dims.replace(seq_len=length), self.method.segment_len(self.params)
        return symbols.bindings(dims, self.params, DTYPE_BYTES["fp32"], segment)

    def limit(self, formula: Expr) -> float:
        """Slope of a formula where its highest power is alone."""
        return local_slope(formula, {**self._values(self.longest), "T": FAR})

    def slope(self, term: Expr) -> float:
        """Slope of one term between the longest traced lengths; a term that only begins there bounds nothing."""
        last, before = sorted(self.points, reverse=True)[:2]
        high, low = self.value(term, last), self.value(term, before)
        if low > 0 and high > 0:
            return local_slopes([before, last], [low, high])[0].value
        return math.inf if high > 0 else 0.0

    @property
    def longest(self) -> int:
        return max(self.points)

    def supplement(self, verdict: Verdict) -> Verdict:
        """The numbers at the longest traced length, for the terms that are numbers; they must agree there too."""
        if self.cost is None or not self.points:
            return verdict
        point, length = self.points[self.longest], self.longest
        formulas: dict[str, tuple[Expr | None, int, float]] = {
            "FLOPs": (total(self.cost.flops), point.flops, 0.0),
            "parameters": (self.cost.num_parameters, point.num_parameters, 0.0),
            "peak memory": (self.cost.peak_bytes, point.peak_bytes, PEAK_SHARE),
        }
        if verdict.term in ("algorithmic FLOPs", "state bytes"):
            formula = self.cost.state_bytes if verdict.term == "state bytes" else total(self.cost.algorithmic)
            return replace(verdict, claimed=_words(formula))
        formula, seen, share = formulas.get(verdict.term, (None, 0, 0.0))
        if formula is None:
            return verdict
        expected = self.value(formula, length)
        agrees = abs(seen - expected) <= share * expected
        where = f"{expected:,} by formula at {format_tokens(length)}, forward"
        evidence = verdict.evidence if agrees else f"{where}; {seen:,} traced ({_share(seen, expected)})"
        return replace(
            verdict, claimed=f"{_words(formula)}: {expected:,} at {format_tokens(length)}", seen=f"{seen:,}",
            verdict=verdict.verdict if agrees else VIOLATED, evidence=evidence,
        )  # fmt: skip

    def growth(self) -> list[Verdict]:
        """Counted FLOPs and traced peak against the declared growth, forward.

        A peak without a formula is held to the work, because bytes that are written cost time, whether a matrix is
        multiplied or not: it may grow as the fastest term of the work does at these lengths.
        """
        start = {"method": self.method.name, "impl": self.impl, "mode": "forward"}
        if self.cost is None or len(self.points) < 2:
            reason = self.trouble or "METHOD.cost is not given"
            verdict = self.without if self.trouble or self.cost else NOT_CLAIMED
            return [
                Verdict(term=term, verdict=verdict, evidence=reason, **start) for term in (FLOPS_GROWTH, PEAK_GROWTH)
            ]
        work, lengths = total(self.cost.flops), list(self.points)
        found = []
        for term, formula, name in (
            (FLOPS_GROWTH, work, "flops"), (PEAK_GROWTH, self.cost.peak_bytes, "peak_bytes"),
        ):  # fmt: skip
            basis = work if formula is None else formula
            limit = self.limit(basis)
            if formula is None:
                limit = max(limit, *(self.slope(each) for each in self.cost.flops.values()))
            seen = [getattr(point, name) for point in self.points.values()]
            declared = [self.value(basis, length) for length in lengths]
            verdict, claimed, shown, evidence = judge_growth(lengths, seen, declared, limit)
            claimed = f"{big_o(basis)}, {claimed}" if claimed else big_o(basis)
            found.append(Verdict(term=term, verdict=verdict, claimed=claimed, seen=shown, evidence=evidence, **start))
        return found


def _words(formula: Expr) -> str:
    words = text(formula)
    return f"{big_o(formula)} {words}" if len(words) <= LONGEST else big_o(formula)


def _share(seen: int, expected: int) -> str:
    return f"{seen / expected - 1:+.1%}" if expected else "expected 0"
