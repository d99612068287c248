"""Closed forms of the Memorizing Transformer. Derivation in README.md.

Segment t finds ``min(t S, M)`` pairs in the memory. Sums over segments are N whole ones and a rest of T mod S tokens.
"""

from __future__ import annotations

from sympy import Expr, Integer, Min, Piecewise, Rational, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, h, param
from ctxbench.cost.terms import FUSED_BACKWARD, attention, linear, projections, tensor
from ctxbench.implementations._shared.biased_window_forms import (
    BLOCK,
    block_pairs,
    ramp,
    seen_pairs,
    streamed_pairs,
    window_parameters,
)
from ctxbench.implementations._shared.flash_table import DQ_ALONE
from ctxbench.implementations._shared.forms import block_ffn, block_parameters, core_backward, position_parameters
from ctxbench.implementations.memorizing.params import MemorizingParams
from ctxbench.implementations.memorizing.peak import peak

M, S, W, K = (param(name) for name in ("memory_len", "segment_len", "window", "top_k"))
WHOLE = floor(T / S)
REST = T - WHOLE * S


def cost(impl: str, mode: str, causal: bool, position: str, params: MemorizingParams) -> Cost:
    """One impl in one mode."""
    retrieved = Min(K, M) if params.lookup == "topk" else M
    tokens, stored, read = T, _segment_sum(M), _segment_sum(retrieved)
    seen = seen_pairs(W)
    executed = _window_pairs(impl, mode, params)
    if mode == "decode":
        tokens, stored = Integer(1), Min(M, WHOLE * S)
        read, seen = Min(retrieved, stored), Min(T, W - 1) + 1
        executed = seen
    terms = {
        "projections": L * projections(tokens),
        "window": L * attention(seen),
        "search": linear(B * stored, d, 1),
        "read": linear(B * read, d, 1),
        "ffn": block_ffn(tokens),
    }
    flops = {**terms, "window": L * attention(executed)}
    if impl == "reference":
        flops["read"] = flops["search"]  # every pair has a weight, most of them 0
    if mode == "train":
        read_back = 2 * terms["read"]  # gradients of weights and queries; what is in memory gets none
        algorithmic = {term: (1 if term in ("search", "read") else 3) * value for term, value in terms.items()}
        algorithmic["read"] += read_back
        core = core_backward("blocked" if impl == "native" else impl, position)
        backward = {"window": core, "search": 1, "read": 1}
        if impl in ("blocked", "native"):
            backward.update(search=0, read=0)
            fused = _fused_pairs(params)
            flops["memory_backward"] = FUSED_BACKWARD * attention(fused) + 2 * linear(B * (read - fused), d, 1)
        elif impl == "triton":
            dense = params.lookup == "dense" or params.top_k >= params.memory_len
            backward.update(search=0, read=0)
            flops["memory_backward"] = Rational(DQ_ALONE) * attention(stored) if dense else read_back
        flops = {
            term: value if term == "memory_backward" else (1 + backward.get(term, 2)) * value
            for term, value in flops.items()
        }
    else:
        algorithmic = terms
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(window_parameters()) + h + position_parameters(position),
        state_bytes=2 * tensor(B, _state_rows(params), d),
        peak_bytes=None if impl == "triton" and position != "none" else peak(impl, mode, params, position),
        depth=L,
    )


def _segment_sum(most: Expr) -> Expr:
    """Sum over all tokens of ``min(tokens before its segment, most)``."""
    return S * ramp(WHOLE, S, most) + REST * Min(WHOLE * S, most)


def _fused_pairs(params: MemorizingParams) -> Expr:
    """Pairs of segments whose whole memory is read, by the fused kernel of ``blocked`` and ``native``."""
    if params.lookup == "dense" or params.top_k >= params.memory_len:
        return _segment_sum(M)
    short = Min(WHOLE, floor(K / S) + 1)  # segments with at most K pairs
    return S * ramp(short, S, M) + Piecewise((REST * WHOLE * S, WHOLE * S <= K), (Integer(0), True))


def _window_pairs(impl: str, mode: str, params: MemorizingParams) -> Expr:
    if impl == "triton" or (impl == "native" and mode != "train"):
        return seen_pairs(W)
    block = params.window if impl == "reference" else BLOCK
    if mode == "stream":
        return streamed_pairs(params.segment_len, W, block)
    return block_pairs(T, W, sympify(block))


def _state_rows(params: MemorizingParams) -> Expr:
    """Rows of keys over all layers: a window each, in one of them also the memory and the segment under way."""
    local = Min(T, W - 1)
    if not params.memory_len:
        return L * local
    phase = T - WHOLE * S
    recent = Piecewise((phase, phase > local), (local, True))
    return (L - 1) * local + Min(M, WHOLE * S) + recent
