"""The letters every formula shares. All are positive integers; ``e`` is bytes an element."""

from __future__ import annotations

import dataclasses
from typing import Any

from sympy import Symbol
from sympy.core.cache import cacheit
from sympy.functions.elementary import miscellaneous

from ctxbench.method import Dims, Params

# Min and Max compare their arguments by factoring differences, which builds the Min and Max inside anew, which compare
# theirs. With SymPy's own memory for what was factored, formulas of nested ones take less than half the time.
miscellaneous.factor_terms = cacheit(miscellaneous.factor_terms)


def _size(name: str) -> Symbol:
    return Symbol(name, integer=True, positive=True)


B = _size("B")  # batch
T = _size("T")  # tokens of the sequence; decode: tokens already in the context
d = _size("d")  # d_model
h = _size("h")  # heads
f = Symbol("f", integer=True, nonnegative=True)  # FFN width; 0 means no FFN
L = _size("L")  # layers
e = _size("e")  # bytes an element
C = _size("C")  # tokens a call in stream mode

MEANING = {
    "B": "batch size",
    "T": "sequence length in tokens",
    "d": "d_model",
    "h": "heads",
    "f": "FFN width",
    "L": "layers",
    "e": "bytes an element",
    "C": "tokens a call in stream mode",
}


def param(name: str) -> Symbol:
    """The symbol of a method's integer parameter; bound to its value by name. May be zero."""
    return Symbol(name, integer=True, nonnegative=True)


def bindings(dims: Dims, params: Params, itemsize: int, segment_len: int) -> dict[str, Any]:
    """Values of all symbols, by name, for one cell."""
    values: dict[str, Any] = {
        "B": dims.batch_size,
        "T": dims.seq_len,
        "d": dims.d_model,
        "h": dims.num_heads,
        "f": dims.d_ff,
        "L": dims.num_layers,
        "e": itemsize,
        "C": min(segment_len, dims.seq_len),
    }
    for spec in dataclasses.fields(params):
        value = getattr(params, spec.name)
        if isinstance(value, int):
            values[spec.name] = int(value)
    return values
