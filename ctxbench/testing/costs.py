"""Laws about cost: what the formulas say is what the dispatcher and the allocator see, as integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ctxbench.cost import Cost, evaluate, total
from ctxbench.cost.symbols import bindings
from ctxbench.cost.trace import Meter, Trace, trace, uncompiled_flex_attention
from ctxbench.method import DTYPE_BYTES, Dims
from ctxbench.testing.case import TINY, Case
from ctxbench.testing.law import law, not_applicable, not_claimed, require
from ctxbench.workload import num_parameters, prepare, state_bytes

LONG = (4096, 8192)  # where a peak must be within PEAK of its formula
LITERAL = (1024,)  # the same for as_written impls, some of which loop over tokens in Python
PEAK = 0.03
ORDINARY = TINY.replace(batch_size=1, d_model=128, num_heads=4, num_layers=1, d_ff=512)


@law(every_form=True, literal=True)
def flops_equal_formula(case: Case) -> str:
    """Formula FLOPs equal counted FLOPs as integers: every mode, odd lengths, several widths, depths and batches."""
    compared = 0
    for mode in _costed_modes(case):
        for dims in _sizes(case, mode):
            traced = _counted(case, dims, mode)
            cost = _cost(case, mode, dims)
            formula = _value(total(cost.flops), case, dims)
            terms = {term: _value(value, case, dims) for term, value in cost.flops.items()}
            require(
                formula == traced.flops and not traced.uncounted,
                expected=f"{mode} FLOPs {formula:,} = {terms}",
                seen=f"counted {traced.flops:,} = {traced.by_op}, uncounted {traced.uncounted or 'nothing'}",
                at=case.where(**_sizes_of(dims)), look="cost.py: the edges (first and last block, diagonal), what the "
                "impl executes beyond what is visible, backward factors; or register a formula for a custom operator",
            )  # fmt: skip
            compared += 1
    return f"{compared} sizes"


@law(literal=True)
def flops_are_seen(case: Case) -> str:
    """The tracer understands every operator that may multiply matrices, and does not count 0 for a method that does."""
    traced = _traced(case, case.dims, "forward")
    require(
        traced.flops > 0 or not traced.uncounted, expected="counted FLOPs above 0",
        seen=f"0, and operators without a formula: {traced.uncounted}", at=case.where(),
        look="ctxbench.cost.formulas.formula, which registers one for a custom operator",
    )  # fmt: skip
    really = _counted(case, case.dims, "forward")
    require(
        traced.flops == really.flops, expected=f"fake tensors to show the {really.flops:,} FLOPs of real ones",
        seen=f"{traced.flops:,} = {traced.by_op}", at=case.where(), look="branches on the values or kind of a tensor",
    )  # fmt: skip
    if traced.uncounted:
        return f"coverage {traced.coverage:.1%}, without a formula: {', '.join(traced.uncounted)}"
    return f"{traced.flops:,} FLOPs"


@law(every_form=True)
def algorithmic_flops_agree(case: Case) -> None:
    """What the mathematics needs is the same whoever computes it."""
    for mode in _costed_modes(case):
        mine, theirs = (_cost(replace(case, impl=impl), mode, case.dims) for impl in (case.impl, case.method.oracle))
        a, b = (_value(total(cost.algorithmic), case, case.dims) for cost in (mine, theirs))
        require(
            a == b, expected=f"the algorithmic FLOPs of {case.method.oracle} in {mode}: {b:,}", seen=f"{a:,}",
            at=case.where(), look="cost.py: algorithmic depends on the mode, never on the impl",
        )  # fmt: skip


@law(every_form=True, literal=True, retabled=True)
def parameters_equal_formula(case: Case) -> str:
    """The number of parameters is the formula's."""
    mode = _costed_modes(case)[0]
    for dims in (case.dims, case.dims.replace(d_ff=0)):
        cost = _cost(case, mode, dims)
        formula, seen = _value(cost.num_parameters, case, dims), num_parameters(case.build(d_ff=dims.d_ff))
        require(
            formula == seen, expected=f"{formula:,} parameters", seen=f"{seen:,}", at=case.where(d_ff=dims.d_ff),
            look="cost.py num_parameters: biases, norms, d_ff = 0",
        )  # fmt: skip
    return f"{seen:,}"


@law(every_form=True)
def state_bytes_equal_formula(case: Case) -> str:
    """The bytes carried after T tokens are the formula's, at several T."""
    modes = [mode for mode in ("stream", "decode") if case.supports(mode)]
    if not modes:
        not_applicable(case.supports("stream").reason)
    if case.method.cost is None:
        not_claimed("METHOD.cost is not given")
    lengths = case.lengths(modes[0])
    for length in lengths:
        module = case.build(seq_len=length)
        seen = state_bytes(module.state_at(case.dims.batch_size, length))  # type: ignore[operator]
        for mode in modes:
            dims = case.dims.replace(seq_len=length)
            formula = _value(_cost(case, mode, dims).state_bytes, case, dims, case.dtype)
            require(
                formula == seen, expected=f"{mode}: {formula:,} bytes of state", seen=f"{seen:,}",
                at=case.where(seq_len=length), look="cost.py state_bytes, and what state_at keeps alive",
            )  # fmt: skip
    return f"T = {', '.join(map(str, lengths))}"


@law(literal=True)
def peak_equals_formula(case: Case) -> str:
    """The traced allocator peak is within 3 % of the formula at 4k and 8k tokens in every mode that declares one."""
    modes = [mode for mode in _costed_modes(case) if _cost(case, mode, case.dims).peak_bytes is not None]
    if not modes:
        not_claimed("no mode declares peak_bytes")
    largest = 0.0
    ordinary = replace(case, params=case.method.params())
    compared = []
    for mode in modes:
        for length in LITERAL if case.literal else LONG:
            layers = max(1, ordinary.method.fewest_layers(ordinary.params))
            dims = ORDINARY.replace(
                seq_len=length, causal=case.dims.causal, position=case.dims.position, num_layers=layers
            )
            sized = replace(ordinary, dims=dims)
            dtype = next((dtype for dtype in ("fp32", "bf16") if sized.supports(mode, dtype=dtype)), None)
            if dtype is None:
                continue
            formula = _value(_cost(sized, mode, dims).peak_bytes, sized, dims, dtype)
            seen = _traced(sized, dims, mode, dtype).peak_bytes
            error = abs(seen - formula) / formula if formula else float(seen > 0)
            require(
                error <= PEAK, expected=f"a {mode} peak of {formula:,} bytes within 3 %",
                seen=f"{seen:,} ({(seen - formula) / max(formula, 1):+.1%})", at=sized.where(),
                look="cost.py peak_bytes: what is alive together at the worst moment (del what is no longer needed)",
            )  # fmt: skip
            largest = max(largest, error)
            compared.append(mode)
    if not compared:
        not_applicable("the method takes none of the lengths that are tried")
    return f"{', '.join(dict.fromkeys(compared))}; largest error {largest:.2%}"


def _sizes(case: Case, mode: str) -> Iterator[Dims]:
    """Lengths at the case's own sizes, then other widths, depths and batches at an odd length."""
    moved = case.dims.position != case.method.positions[0]  # no length means more to a position than to the others
    lengths = case.lengths(mode, most=2 if moved else 3 if case.label else 7)
    for length in lengths:
        yield case.dims.replace(seq_len=length)
    if mode == "stream":  # several whole calls and a shorter one
        beyond = 2 * case.method.segment_len(case.params) + 3
        if case.supports(mode, seq_len=beyond):
            yield case.dims.replace(seq_len=beyond)
    odd = next((n for n in reversed(lengths) if n % 2), lengths[-1])
    layers = case.method.fewest_layers(case.params)
    for changes in (
        {"batch_size": 1, "num_layers": layers, "d_ff": 0},
        {"batch_size": 3, "d_model": 24, "num_heads": 3, "d_ff": 40, "num_layers": layers + 1},
    ):
        dims = case.dims.replace(seq_len=odd, **changes)
        if case.supports(mode, **_sizes_of(dims)):
            yield dims


def _costed_modes(case: Case) -> list[str]:
    if case.method.cost is None:
        not_claimed("METHOD.cost is not given")
    modes = [mode for mode in case.modes if case.supports(mode)]
    if not modes:
        not_applicable("no mode is supported")
    costed = [m for m in modes if _formulas(case, m, case.dims) is not None]
    if not costed:
        not_claimed(f"METHOD.cost gives nothing for {case.impl}")
    return costed


def _formulas(case: Case, mode: str, dims: Dims) -> Any:
    return _built(case.method.cost_of, case.impl, mode, dims.causal, dims.position, case.params)


@lru_cache(maxsize=256)
def _built(cost_of: Callable[..., Any], *branch: Any) -> Any:
    """Building expressions takes SymPy longer than evaluating them at every size."""
    return cost_of(*branch)


def _cost(case: Case, mode: str, dims: Dims) -> Cost:
    cost = _formulas(case, mode, dims)
    if not isinstance(cost, Cost):
        raise TypeError(f"METHOD.cost must return a ctxbench.cost.Cost, received {type(cost).__name__}")
    return cost


def _value(expression: Any, case: Case, dims: Dims, dtype: str = "fp32") -> int:
    segment = case.method.segment_len(case.params)
    return evaluate(expression, bindings(dims, case.params, DTYPE_BYTES[dtype], segment))


def _counted(case: Case, dims: Dims, mode: str) -> Trace:
    """Count on real tensors: at tiny sizes an order of magnitude faster than fake ones, and no shape stops it."""
    work = prepare(case.method, dims, case.params, case.impl, mode, "fp32", case.device, rotate=1)
    with uncompiled_flex_attention(), Meter() as meter:
        work.call()
    return meter.result()


def _traced(case: Case, dims: Dims, mode: str, dtype: str = "fp32") -> Trace:
    result = trace(case.method, dims, case.params, case.impl, mode, dtype, case.device)
    if result.untraceable:
        not_applicable(f"cannot be traced: {result.untraceable}")
    return result


def _sizes_of(dims: Dims) -> dict[str, Any]:
    return {
        name: getattr(dims, name) for name in ("seq_len", "batch_size", "d_model", "num_heads", "num_layers", "d_ff")
    }
