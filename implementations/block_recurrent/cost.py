"""Closed forms of the Block-Recurrent Transformer. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer, Min, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, h, param
from ctxbench.cost.terms import attention, largest, linear, linear_parameters, projections, tensor
from ctxbench.implementations._shared.biased_window_forms import (
    BLOCK,
    block_pairs,
    seen_pairs,
    streamed_pairs,
    window_parameters,
)
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    position_parameters,
    replayed,
)
from ctxbench.implementations.block_recurrent.params import BlockRecurrentParams
from ctxbench.implementations.block_recurrent.peak import peak

W, R = param("window"), param("num_states")
WHOLE = floor(T / W)


def cost(impl: str, mode: str, causal: bool, position: str, params: BlockRecurrentParams) -> Cost:
    """One impl in one mode. ``stream`` takes a window a call, so that no window is split."""
    if impl == "graph":
        return replayed(*(cost("triton", each, causal, position, params) for each in (mode, "stream")))
    lstm = params.gate == "lstm"
    tokens: Expr = Integer(1) if mode == "decode" else T
    updates, keys = _updates(mode)
    seen = Min(T, W - 1) + 1 if mode == "decode" else seen_pairs(W)
    terms = {
        "projections": L * projections(tokens) + linear(B * tokens, d, 2 * d),
        "window": L * attention(seen),
        "read": attention(tokens * R),
        "write": attention(updates * R * R + keys * R),
        "states": updates * linear(B * R, d, (8 if lstm else 6) * d),
        "initial": linear(R, d, 2 * d) if mode != "decode" else Integer(0),
        "ffn": block_ffn(tokens),
    }
    flops = {**terms, "window": L * attention(_executed(impl, mode, params))}
    if mode == "train":
        core = dict.fromkeys(("read", "write"), core_backward(impl)) | {"window": core_backward(impl, position)}
        flops = {term: value * (1 + core.get(term, Integer(2))) for term, value in flops.items()}
        terms = {term: 3 * value for term, value in terms.items()}
    states = 6 * d * d + 3 * d + 2 * R * d + 3 * h + (2 * linear_parameters(d, d) if lstm else d)
    phase = T - WHOLE * W
    rows = (L - 1) * Min(T, W - 1) + Min(T, W + phase)
    parameters = block_parameters(window_parameters()) + 2 * d * d + states + position_parameters(position)
    highest = peak(impl, mode, params)
    if mode == "train" and highest is not None:  # at the end, few tokens hold less than gradients of parameters
        highest = largest(highest, tensor(parameters) + tensor(B, T, d))
    return Cost(
        algorithmic=terms,
        flops=flops,
        num_parameters=parameters,
        state_bytes=tensor(B, 3 * R, d) + 2 * tensor(B, rows, d),
        peak_bytes=highest,
        depth=L if mode == "decode" else L - 1 + ceiling(T / W),
    )


def _updates(mode: str) -> tuple[Expr, Expr]:
    """Updates of the states, and the token keys they read in sum: those of two windows, of one at first."""
    if mode == "decode":
        updates = floor((T + 1) / W) - WHOLE
        return updates, updates * Min(2 * W, T + 1)
    updates = WHOLE if mode == "stream" else floor((T - 1) / W)
    return updates, W * (2 * updates - Min(updates, 1))


def _executed(impl: str, mode: str, params: BlockRecurrentParams) -> Expr:
    if mode == "decode":
        return Min(T, W - 1) + 1
    if impl == "triton":
        return seen_pairs(W)
    block = params.window if impl == "reference" else BLOCK
    if mode == "stream":
        return streamed_pairs(params.window, W, block)
    return block_pairs(T, W, sympify(block))
