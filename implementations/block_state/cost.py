"""Closed forms of block attention with a state. Derivation in README.md.

N whole blocks of b tokens and a rest of R; every block that has begun holds k rows more than it has tokens.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, e, param
from ctxbench.cost.terms import (
    attention,
    linear,
    linear_parameters,
    projections,
    tensor,
    triangle,
)
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    position_parameters,
    replayed,
)
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations.block_state.params import BlockStateParams
from ctxbench.implementations.block_state.peak import peak

b, k = param("block_len"), param("num_states")
WHOLE = floor(T / b)
REST = T - WHOLE * b
SOME = Min(REST, 1)


def cost(impl: str, mode: str, causal: bool, position: str, params: BlockStateParams) -> Cost:
    """One impl in one mode. ``stream`` takes a block a call, so that no block is split."""
    if impl == "graph":
        return replayed(*(cost("triton", each, causal, position, params) for each in (mode, "stream")))
    states = L if params.variant == "layer" else Integer(1)
    made = linear(B * k, 2 * d, d) + linear(B * k, d, d) if params.update == "mlp" else 2 * linear(B * k, d, 3 * d)
    rows, seen, executed = _work(mode, impl)
    algorithmic = {
        "projections": L * projections(rows),
        "attention": L * attention(seen),
        "ffn": block_ffn(rows),
        "update": states * _updates(mode) * made,
    }
    flops = {**algorithmic, "attention": L * attention(executed)}
    if mode == "train":
        core = core_backward({"diagonal": "blocked", "diagonal_triton": "triton"}.get(impl, impl), position)
        flops = {term: value * (1 + core if term == "attention" else 3) for term, value in flops.items()}
        algorithmic = {term: 3 * value for term, value in algorithmic.items()}
    unit = (
        linear_parameters(2 * d, d) + linear_parameters(d, d)
        if params.update == "mlp"
        else 2 * linear_parameters(d, 3 * d)
    )
    layers = block_parameters(4 * linear_parameters(d, d)) + position_parameters(position)
    cached = Piecewise((REST + k, REST > 0), (Integer(0), True))
    blocks = Integer(1) if mode == "decode" else ceiling(T / b)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=layers + states * (unit + k * d),
        state_bytes=states * (tensor(B, k, d) + Max(e, 4) * B * d) + 2 * L * tensor(B, cached, d),
        peak_bytes=peak(impl, mode, params.variant) if position == "none" and not impl.startswith("diag") else None,
        depth=L + blocks - 1 if params.variant == "layer" else L * blocks,
    )


def _updates(mode: str) -> Expr:
    """States made: a whole sequence skips the one that nothing would read."""
    if mode == "decode":
        return floor((T + 1) / b) - WHOLE
    return WHOLE if mode == "stream" else floor((T - 1) / b)


def _work(mode: str, impl: str) -> tuple[Expr, Expr, Expr]:
    """Rows that pass a layer, pairs the mathematics needs, pairs that are multiplied."""
    square = {"reference": lambda n: sympify(n) ** 2, "slabs": own_pairs}.get(impl, triangle)
    if mode == "decode":
        inside = REST > 0
        rows = Piecewise((Integer(1), inside), (k + 1, True))
        keys = REST + k + 1
        seen, executed = (Piecewise((keys, inside), (form(k + 1), True)) for form in (triangle, square))
        return rows, seen, executed
    pairs = [WHOLE * form(b + k) + SOME * form(REST + k) for form in (triangle, square)]
    return T + k * (WHOLE + SOME), pairs[0], pairs[1]
