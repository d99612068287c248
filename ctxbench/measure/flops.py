"""Counted FLOPs, traffic and traced peak of one call: on fake tensors, or on real ones where shapes need values."""

from __future__ import annotations

from ctxbench.cost import trace as tracer
from ctxbench.cost.trace import Meter, Trace
from ctxbench.method import Dims, Method, Params
from ctxbench.workload import Workload

WEAKNESS = (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError)  # what fake tensors fail with


def count(
    method: Method, dims: Dims, params: Params, impl: str, mode: str, dtype: str, device: str = "cpu"
) -> Trace:  # fmt: skip
    """Trace one call without memory or arithmetic; an impl that cannot be traced says so in ``untraceable``."""
    try:
        return tracer.trace(method, dims, params, impl, mode, dtype, device)
    except WEAKNESS as error:
        return Trace(untraceable=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}")


def count_real(work: Workload) -> Trace:
    """Count the operators of a real call: slower than the call itself, but shapes may depend on values."""
    meter = Meter()
    with meter:
        y = work.call()
    del y
    coverage = 1.0 - meter.moved_unknown / meter.moved if meter.moved else 1.0
    return Trace(
        flops=sum(meter.flops.values()), by_op=dict(meter.flops), bytes_moved=meter.moved,
        uncounted=dict(meter.uncounted), coverage=coverage,
    )  # fmt: skip
