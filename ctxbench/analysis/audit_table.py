"""The complexity table of the first source document: each entry as claimed, as written, and true, at one size.

*As claimed* is the document's expression, evaluated. *As written* is what the tracer sees of the method's
``as_written`` impl, which rebuilds the document's sketch. *True* is the method's own formula: algorithmic FLOPs, or the
smallest peak that an impl of it declares. Compute is in FLOPs, memory in elements, of one layer, forward, batch 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sympy import Expr, Symbol

from ctxbench.analysis.audit import HOLDS, NOT_APPLICABLE, VIOLATED
from ctxbench.analysis.audit_method import Tracer
from ctxbench.cost import symbols
from ctxbench.cost.model import Cost, big_o, evaluate, text, total
from ctxbench.cost.symbols import T, d
from ctxbench.method import DTYPE_BYTES, Dims, Method, Params

MEMORY, WINDOW = (Symbol(name, integer=True, positive=True) for name in ("memory_size", "window_size"))
SKETCH = "as_written"
ITEMSIZE = DTYPE_BYTES["fp32"]
FACTOR = 2.0  # claimed and true may differ by so much before the entry counts as wrong


@dataclass(frozen=True)
class Size:
    """Where the table is evaluated; the document's own call gives memory and window, and no length."""

    seq_len: int = 8192
    d_model: int = 512
    num_heads: int = 8
    memory_size: int = 1024
    window_size: int = 512

    def __str__(self) -> str:
        return (
            f"{self.seq_len} tokens, d_model {self.d_model}, {self.num_heads} heads, memory_size {self.memory_size}, "
            f"window_size {self.window_size}, d_ff {4 * self.d_model}; one layer or the fewest the method has"
        )


@dataclass(frozen=True)
class Claimed:
    """One row of the document's table: its name, the two expressions, and the method it speaks of."""

    name: str
    method: str
    memory: Expr
    compute: Expr
    params: dict[str, Any] = field(default_factory=dict)  # a value, or an expression that gives it


TABLE = (
    Claimed("standard_transformer", "dense", T**2, T**2 * d),
    Claimed(
        "memory_augmented", "memory_bank", T * d + MEMORY * d, T * MEMORY * d + T**2 * d,
        {"num_slots": MEMORY, "segment_len": T},  # the document's self-attention spans the sequence
    ),
    Claimed("recurrent_transformer", "segment_recurrent", T * d + MEMORY * d, T * d**2, {"memory_len": MEMORY}),
    Claimed("hierarchical_attention", "hierarchical", 3 * T * d, 3 * T * d, {"form": "seed"}),
    Claimed("longformer", "longformer", T * WINDOW, T * WINDOW * d, {"window": WINDOW}),
)  # fmt: skip


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One of the ten entries. Numbers are FLOPs or elements; None where there is no such impl or formula.

    ``ratio`` is claimed / true; ``basis`` names the formula behind ``true``.
    """

    name: str
    quantity: str
    method: str
    formula: str
    claimed: int
    claimed_growth: str
    as_written: int | None = None
    written_growth: str = ""
    true: int | None = None
    true_growth: str = ""
    ratio: float | None = None
    basis: str = ""
    verdict: str = NOT_APPLICABLE
    evidence: str = ""


def audit_table(methods: Iterable[Method], trace: Tracer, size: Size | None = None) -> list[Entry]:
    """The ten entries; every number is computed from an expression, a formula or a trace."""
    size, known = size or Size(), {method.name: method for method in methods}
    entries = []
    for row in TABLE:
        subject = _Subject(known[row.method], row, size, trace) if row.method in known else None
        for quantity, formula in (("memory", row.memory), ("compute", row.compute)):
            entries.append(_entry(row, quantity, formula, subject, size))
    return entries


class _Subject:
    """The method that a row speaks of, at the size of the table: bidirectional where its sketch is."""

    def __init__(self, method: Method, row: Claimed, size: Size, trace: Tracer):
        self.method = method
        given = {name: value for name, value in row.params.items() if isinstance(value, Expr)}
        self.with_length = {symbols.param(name): value for name, value in given.items() if value.has(T)}
        values = {name: evaluate(value, _claimed_values(size)) for name, value in given.items()}
        self.params: Params = method.params().replace(**{**row.params, **values})
        names = [impl.name for impl in method.impls]
        sketch = SKETCH if SKETCH in names else None
        dims = Dims(
            seq_len=size.seq_len, d_model=size.d_model, num_heads=size.num_heads, d_ff=4 * size.d_model,
            num_layers=max(1, method.fewest_layers(self.params)), position=method.positions[0],
        )  # fmt: skip
        directions = [dims.replace(causal=causal) for causal in (False, True)]
        self.dims = next((each for each in directions if self._takes(each, sketch)), directions[-1])
        self.costs = {name: self._cost(name) for name in names}
        self.traced = (
            trace(method, self.dims, self.params, sketch) if sketch and self._takes(self.dims, sketch) else None
        )
        self.sketch = self.costs[sketch] if sketch else None
        self.values = symbols.bindings(self.dims, self.params, ITEMSIZE, method.segment_len(self.params))

    def _takes(self, dims: Dims, impl: str | None) -> bool:
        answer = self.method.mode_support("forward", dims, self.params)
        if impl and answer:
            answer = self.method.impl_support(self.method.impl(impl), "forward", dims, self.params, "cpu", "fp32")
        return bool(answer)

    def _cost(self, impl: str) -> Cost | None:
        found: Cost | None = self.method.cost_of(impl, "forward", self.dims.causal, self.dims.position, self.params)
        return found

    def growth(self, formula: Expr) -> str:
        """Growth with the length, with the parameters that are a length."""
        return big_o(formula.subs(self.with_length))

    def true(self, quantity: str) -> tuple[Expr, int, str] | None:
        """The formula, its value, and whose it is."""
        honest = {name: cost for name, cost in self.costs.items() if cost is not None and name != SKETCH}
        if quantity == "compute":
            for cost in honest.values():
                formula = total(cost.algorithmic)
                return formula, evaluate(formula, self.values), "algorithmic FLOPs"
            return None
        peaks = {name: cost.peak_bytes for name, cost in honest.items() if cost.peak_bytes is not None}
        if not peaks:
            return None
        values = {name: evaluate(formula, self.values) for name, formula in peaks.items()}
        least = min(values, key=lambda name: values[name])
        return peaks[least], values[least] // ITEMSIZE, f"peak of {self.method.name} / {least}"


def _entry(row: Claimed, quantity: str, formula: Expr, subject: _Subject | None, size: Size) -> Entry:
    claimed = evaluate(formula, _claimed_values(size))
    entry = Entry(
        name=row.name, quantity=quantity, method=row.method, formula=text(formula), claimed=claimed,
        claimed_growth=big_o(formula),
    )  # fmt: skip
    if subject is None:
        return msgspec.structs.replace(entry, evidence=f"the method {row.method} is not installed")
    if subject.traced is not None and not subject.traced.untraceable and subject.sketch is not None:
        seen = subject.traced.flops if quantity == "compute" else subject.traced.peak_bytes // ITEMSIZE
        sketch = total(subject.sketch.flops) if quantity == "compute" else subject.sketch.peak_bytes
        growth = "" if sketch is None else subject.growth(sketch)
        entry = msgspec.structs.replace(entry, as_written=seen, written_growth=growth)
    found = subject.true(quantity)
    if found is None:
        return msgspec.structs.replace(entry, evidence="the method declares no such formula")
    true_formula, true, basis = found
    growth, ratio = subject.growth(true_formula), claimed / true
    wrong = []
    if growth != entry.claimed_growth:
        wrong.append(f"grows as {growth}, not {entry.claimed_growth}")
    if ratio < 1 / FACTOR:
        wrong.append(f"claims {1 / ratio:.3g} times too little")
    elif ratio > FACTOR:
        wrong.append(f"claims {ratio:.3g} times too much")
    return msgspec.structs.replace(
        entry, true=true, true_growth=growth, ratio=ratio, basis=basis, verdict=VIOLATED if wrong else HOLDS,
        evidence="; ".join(wrong) or f"same growth, within a factor of {FACTOR:g}",
    )  # fmt: skip


def _claimed_values(size: Size) -> dict[str, int]:
    return {"T": size.seq_len, "d": size.d_model, MEMORY.name: size.memory_size, WINDOW.name: size.window_size}
