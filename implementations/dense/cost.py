"""Closed forms of dense attention. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer, Min, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, e, h
from ctxbench.cost.terms import FUSED_BACKWARD, attention, causal_pairs, linear_parameters, projections, tensor
from ctxbench.implementations._shared.forms import block_ffn, block_parameters, stack_peak
from ctxbench.method import Params


def cost(impl: str, mode: str, causal: bool, params: Params) -> Cost:
    """One impl in one mode; every pair a causal query cannot see is free only where the impl skips it."""
    visible = causal_pairs(T) if causal else T * T
    tokens: Expr = T
    if mode == "decode":
        tokens, visible = Integer(1), T + 1
        executed = visible
    elif mode == "stream":
        executed = _streamed_rectangles()
        if impl == "blocked":
            executed = executed - _first_chunk_saving()
    else:
        executed = visible if impl == "blocked" else T * T
    algorithmic = {
        "projections": L * projections(tokens),
        "attention": L * attention(visible),
        "ffn": block_ffn(tokens),
    }
    flops = {**algorithmic, "attention": L * attention(executed)}
    if mode == "train":
        core = FUSED_BACKWARD if impl == "blocked" else 2
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
        flops = {term: forward * (1 + core if term == "attention" else 3) for term, forward in flops.items()}
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(4 * linear_parameters(d, d)),
        state_bytes=2 * L * tensor(B, T, d),
        peak_bytes=_peak(impl, mode, causal),
    )


def _streamed_rectangles() -> Expr:
    """Pairs of chunks of C queries against all keys so far: full rectangles, the last chunk may be shorter."""
    whole = floor(T / C)
    rest = T - whole * C
    return C * C * whole * (whole + 1) / 2 + rest * T


def _first_chunk_saving() -> Expr:
    """The first chunk has no cache, so the fused kernel skips what lies beyond its diagonal."""
    first = Min(C, T)
    return first * (first - 1) / 2


def _peak(impl: str, mode: str, causal: bool) -> Expr | None:
    row = tensor(B, T, d)
    if mode == "forward":
        if impl == "blocked":  # norm, q, k, v, output, log-sum-exp in fp32
            return stack_peak(T, 5 * row + 4 * B * h * T + 2 * e * B * T)
        scores = tensor(B, h, T, T)  # norm, q, k, v; scores and masked scores, or scores and probabilities; the mask
        return stack_peak(T, 4 * row + 2 * scores + (2 * T * T if causal else 0))
    return None
