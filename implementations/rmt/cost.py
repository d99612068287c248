"""Closed forms of the recurrent memory transformer. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer, Min, Mod, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d
from ctxbench.cost.terms import attention, ffn, linear, linear_parameters, projections, tensor, triangle
from ctxbench.implementations._shared.forms import (
    bias_bytes,
    block_parameters,
    core_backward,
    kernels,
    position_parameters,
    replayed,
    slab_pairs,
)
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations.rmt.params import RMTParams
from ctxbench.implementations.rmt.peaks import REST, M, S, peak
from ctxbench.method import ROPE


def cost(impl: str, mode: str, causal: bool, position: str, params: RMTParams) -> Cost:
    """One impl in one mode. ``stream`` takes a segment a call, so that no segment is split."""
    if impl == "graph":
        return replayed(*(cost("triton", each, causal, position, params) for each in (mode, "stream")))
    full = params.variant == "xl"
    how = {"triton": "visible"}.get(kernels(impl), impl)
    if impl == "blocked" and position in ("t5", "alibi"):
        how = "biased"
    begun, written, tokens = _segments(mode)
    rows = tokens + M * (begun + written)
    unread = M * begun  # rows of the top layer whose outputs nobody reads
    algorithmic = {
        "projections": L * projections(rows) - linear(B * unread, d, 2 * d),
        "attention": L * attention(_pairs(mode, written, full, "visible")) - attention(_unread_pairs(begun, full)),
        "ffn": L * ffn(rows) - ffn(unread),
    }
    flops = {
        "projections": L * projections(rows) - linear(B * unread, d, d),
        "attention": L * attention(_pairs(mode, written, full, how)),
        "ffn": L * ffn(rows) - ffn(unread),
    }
    if mode == "train":
        core = core_backward(impl, position)
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
        flops = {term: forward * (1 + core if term == "attention" else 3) for term, forward in flops.items()}
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(4 * linear_parameters(d, d)) + M * d + 2 * d + position_parameters(position),
        state_bytes=tensor(B, M, d) + 2 * L * Min(REST, 1) * tensor(B, M + REST, d),
        peak_bytes=_peak(impl, mode, full, position),
        depth=L if mode == "decode" else L * ceiling(T / S),
    )


def _peak(impl: str, mode: str, full: bool, position: str) -> Expr | None:
    """None where nobody has derived it: training with positions, biases outside of kernels, rotations by ``triton``.

    Nor of ``slabs`` in decode, a mode that it does not have.
    """
    if impl == "slabs" and mode == "decode":
        return None
    rotates = position in ROPE and impl != "triton" and mode != "train"
    biased = position in ("t5", "alibi") and kernels(impl) == "triton" and mode in ("forward", "stream")
    if position != "none" and not rotates and not biased:
        return None
    return peak(kernels(impl), mode, full, rotates) + (bias_bytes(position) if biased else 0)


def _segments(mode: str) -> tuple[Expr, Expr, Expr]:
    """Segments that a call begins (with read tokens) and completes (with write tokens), and its tokens."""
    if mode == "decode":
        return 1 - Min(REST, 1), floor((T + 1) / S) - floor(T / S), Integer(1)
    return ceiling(T / S), floor(T / S) if mode == "stream" else floor((T - 1) / S), T


def _pairs(mode: str, written: Expr, full: bool, how: str) -> Expr:
    """Pairs a layer. ``how``: ``visible``, or what an impl multiplies; ``biased``: blocked, by slabs of queries."""
    if mode == "decode":
        return _decoded_pairs(written, full, how)
    rest = T - S * written  # tokens after the last write
    return written * _segment_pairs(S, M, full, how) + Min(rest, 1) * _segment_pairs(rest, Integer(0), full, how)


def _segment_pairs(tokens: Expr, writes: Expr, full: bool, how: str) -> Expr:
    """Read tokens, ``tokens`` and write tokens from the beginning of a segment."""
    rows = M + tokens + writes
    if how == "reference":
        return rows**2
    causal = {"slabs": own_pairs, "biased": slab_pairs}.get(how, triangle)
    if not full:
        return causal(rows)
    beside = how in ("blocked", "biased", "slabs")  # a product of their own, not instead of the causal one
    reads = M**2 if beside else M**2 - triangle(M)
    return causal(M + tokens) + reads + writes * rows


def _unread_pairs(begun: Expr, full: bool) -> Expr:
    """Pairs of the top layer's read tokens."""
    return begun * (M**2 if full else triangle(M))


def _decoded_pairs(written: Expr, full: bool, how: str) -> Expr:
    """One token in its segment, which it may begin, complete, or both."""
    begins, fill = 1 - Min(Mod(T, S), 1), Mod(T, S)
    fresh = _segment_pairs(Integer(1), M * written, full, how)
    writes, known = M * written, M + fill
    keys = known + 1 + writes
    if how != "reference" and full:
        continued = known + 1 + writes * keys
    else:
        own = {"visible": triangle, "biased": slab_pairs}.get(how, lambda rows: rows**2)
        continued = (1 + writes) * known + own(1 + writes)
    return begins * fresh + (1 - begins) * sympify(continued)
