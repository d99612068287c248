"""Closed forms of the allocator peak: what is alive together at the worst moment of each mode.

A row is one ``[B, n, d]`` tensor of a block's n rows, states included; a call's only output keeps its block's alive.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.products_forms import scratch

b, k = param("block_len"), param("num_states")
WHOLE = floor(T / b)
REST = T - WHOLE * b
SOME = Min(REST, 1)


def peak(impl: str, mode: str, variant: str) -> Expr | None:
    """Bytes above parameters, inputs and incoming state; None where no formula is known."""
    outputs = (L - 1) * row(1) if variant == "layer" else Integer(0)  # of the layers below, a token: all to be pooled
    if mode == "train":
        return _train() if impl == "reference" else None
    if mode == "decode":
        return Piecewise((_inside(impl), REST > 0), (_block(impl, k + 1, outputs, cached=True), True))
    if mode == "stream":
        whole = Min(WHOLE, 1) * (Min(WHOLE - 1, 1) * row(b + k) + _block(impl, b + k, outputs, cached=False))
        return largest(whole, SOME * (Min(WHOLE, 1) * row(b + k) + _block(impl, REST + k, outputs, cached=True)))
    place = Min(ceiling(T / b) - 1, 1) * row(T)  # of all outputs, from the end of the first block on
    blocks = largest(
        Min(WHOLE, 1) * (Min(WHOLE - 1, 1) * place + _block(impl, b + k, outputs, cached=False)),
        SOME * (place + _block(impl, REST + k, outputs, cached=False)),
    )
    states = L if variant == "layer" else Integer(1)
    carried = states * (row(k) + Max(e, 4) * B * d)  # made in the call: vectors, and what is pooled
    return carried + blocks


def row(rows: Expr | int) -> Expr:
    """Bytes of ``rows`` rows of every batch row."""
    return tensor(B, rows, d)


def _block(impl: str, n: Expr, outputs: Expr, cached: bool) -> Expr:
    """All layers over a block's n rows, the last one at its worst; ``cached``: keys and values are kept."""
    below = (L - 1) * 2 * row(n) if cached else Integer(0)
    joined = 2 * row(n) if cached else Integer(0)
    feed = when_ffn(3 * row(n) + 2 * tensor(B, n, f)) + joined
    return below + n * outputs + largest(5 * row(n) + joined + _core(impl, n, n), feed, 6 * row(n) + joined)


def _core(impl: str, n: Expr | int, keys: Expr) -> Expr:
    """Scores twice with mask and its inverse, or with the output; fused: the output and its statistics, or buffers."""
    n = sympify(n)
    if impl in ("blocked", "triton"):
        return row(n) + 4 * B * h * n
    if impl == "slabs":
        return row(n) + scratch(n, keys)
    return 2 * tensor(B, h, n, keys) + n * keys + largest(n * keys, row(n))


def _inside(impl: str) -> Expr:
    """One token of a block that has begun: joined keys and values in every layer."""
    keys = REST + k + 1
    core = _core(impl, 1, keys) if impl == "reference" else 2 * row(1)
    return L * 2 * row(keys) + largest(3 * row(1) + core, when_ffn(3 * row(1) + 2 * tensor(B, f)))


def _train() -> Expr:
    """Backward through the last block's last attention, when all before it is still saved."""

    def saved(n: Expr) -> Expr:
        """One layer, one block: input, norm, q, k, v, mixed, and the probabilities with their mask; the network's."""
        network = when_ffn(2 * row(n) + 2 * tensor(B, n, f) + 8 * B * n)
        return 6 * row(n) + tensor(B, h, n, n) + n * n + 8 * B * n + network

    def last(n: Expr) -> Expr:
        rest_of = 6 * row(n) + tensor(B, h, n, n) + n * n + 8 * B * n
        weights = e * (d * d + d) + when_ffn(e * (2 * d * f + f + 3 * d))
        return (L - 1) * saved(n) + rest_of + 2 * tensor(B, h, n, n) + weights + 2 * row(n)

    whole = Min(WHOLE, 1) * ((WHOLE - 1) * (L * saved(b + k) + row(b + k)) + last(b + k))
    rest = SOME * (WHOLE * (L * saved(b + k) + row(b + k)) + last(REST + k))
    return row(T) + largest(whole, rest)
