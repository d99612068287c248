"""Closed forms of my method. ``ctxbench check`` compares them with what the dispatcher counts, as integers."""

from sympy import Expr, Integer, Min, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, param
from ctxbench.cost.terms import attention, linear_parameters, projections, tensor, window_pairs
from ctxbench.implementations._shared.forms import block_ffn, block_parameters
from ctxbench.method import Params

W = param("window")


def cost(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    """What the mathematics needs (visible pairs) and what the implementation executes (whole rectangles)."""
    tokens: Expr = T
    if mode == "decode":
        tokens, visible = Integer(1), Min(W - 1, T) + 1
        executed: Expr = visible
    else:
        visible = window_pairs(T, W)
        executed = _streamed_rectangles() if mode == "stream" else T * T
    needed = {"projections": L * projections(tokens), "attention": L * attention(visible), "ffn": block_ffn(tokens)}
    flops = {**needed, "attention": L * attention(executed)}
    if mode == "train":  # backward: two products for every product of the forward pass
        needed, flops = ({term: 3 * value for term, value in terms.items()} for terms in (needed, flops))
    return Cost(
        algorithmic=needed,
        flops=flops,
        num_parameters=block_parameters(linear_parameters(d, 3 * d) + linear_parameters(d, d)),
        state_bytes=2 * L * tensor(B, Min(W - 1, T), d),
    )


def _streamed_rectangles() -> Expr:
    """Pairs of calls of C queries against the cache and themselves; the last call may be shorter."""
    whole = floor(T / C)
    rest = T - whole * C
    ramp = Min(whole, floor((W - 1) / C) + 1)  # calls whose cache is not full yet
    cached = C * ramp * (ramp - 1) / 2 + (whole - ramp) * (W - 1)
    return C * (whole * C + cached) + rest * (rest + Min(W - 1, whole * C))
