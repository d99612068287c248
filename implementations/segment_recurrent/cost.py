"""Closed forms of the segment-recurrent transformer. Derivation in README.md."""

from __future__ import annotations

from sympy import Eq, Expr, Integer, Min, Piecewise, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d
from ctxbench.cost.terms import attention, linear, linear_parameters, projections, tensor, triangle
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    position_parameters,
    replayed,
    slab_pairs,
)
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.implementations.segment_recurrent.peaks import peak
from ctxbench.implementations.segment_recurrent.sizes import ADDED, REST, WHOLE, M, S, items_after, sum_of_items


def cost(impl: str, mode: str, causal: bool, position: str, params: SegmentRecurrentParams) -> Cost:
    """One impl in one mode. ``stream`` takes a segment a call, so that no segment is split."""
    if impl == "as_written":
        return _sketch(mode)
    if impl == "graph":
        return replayed(*(cost("triton", each, causal, position, params) for each in (mode, "stream")))
    diagonal = impl.startswith("diagonal")
    forward = _terms(mode, "visible")
    kernels = {"diagonal_triton": "triton", "diagonal": "blocked"}.get(impl, impl)
    how = {"triton": "visible", "blocked": _alignment(params)}.get(kernels, kernels)
    if kernels == "blocked" and position in ("t5", "alibi"):
        how = "biased"
    flops = _terms(mode, how)
    if mode == "train":
        core = core_backward(kernels, position)
        flops = _trained(flops, 1 + core, params)
        forward = _trained(forward, Integer(3), params)
    return Cost(
        algorithmic=forward,
        flops=flops,
        num_parameters=_parameters() + position_parameters(position),
        state_bytes=_state_bytes(),
        peak_bytes=peak("triton" if impl == "triton" else how, mode) if not diagonal and position == "none" else None,
        depth=_depth(impl, mode),
    )


def _alignment(params: SegmentRecurrentParams) -> str:
    """How fused attention puts a memory before a segment; one token sees all keys either way."""
    if params.segment_len == 1:
        return "visible"
    return "padded" if params.memory_len <= params.segment_len else "masked"


def _depth(impl: str, mode: str) -> Expr:
    segments = ceiling(T / S)
    if mode == "decode":
        return L
    return segments + L - 1 if impl.startswith("diagonal") and mode != "stream" else segments * L


def _terms(mode: str, how: str) -> dict[str, Expr]:
    """Forward FLOPs. ``how``: ``visible`` pairs, or what an impl multiplies: see ``_pairs``."""
    if mode == "decode":
        items, begins = Min(M, WHOLE * ADDED), 1 - Min(REST, 1)
        tokens, looking, looked_at = Integer(1), Min(items, 1), begins * items
        own, second, updates = items + REST + 1, items, floor((T + 1) / S) - WHOLE
    else:
        tokens, looking, looked_at = T, T - Min(T, S), sum_of_items(ceiling(T / S))
        own, second = _pairs(how), S * sum_of_items(WHOLE) + REST * items_after(WHOLE)
        updates = WHOLE if mode == "stream" else floor((T - 1) / S)
    return {
        "projections": L * projections(tokens),
        "memory": L * linear(B * looked_at, d, 4 * d),  # keys and values of the memory, for both looks
        "attention": L * attention(own),
        "read": L * linear(B * looking, d, 2 * d),
        "read_attention": L * attention(second),
        "gate": L * linear(B * updates * ADDED, d, d),
        "ffn": block_ffn(tokens),
    }


def _trained(forward: dict[str, Expr], fused: Expr, params: SegmentRecurrentParams) -> dict[str, Expr]:
    """Forward and backward. Before a cut, nothing asks for the gradient of what was remembered last."""
    terms = {name: (fused if "attention" in name else 3) * value for name, value in forward.items()}
    if params.bptt_depth >= 0:
        chain = params.bptt_depth + 1
        cuts = floor((ceiling(T / S) - 1) / chain)
        terms["memory"] -= L * linear(B * sum_of_items(cuts + 1, chain * ADDED), d, 4 * d)  # no gradient of its input
        terms["gate"] -= 2 * L * linear(B * cuts * ADDED, d, d)
    return terms


def _pairs(how: str) -> Expr:
    """Pairs of the first look over all segments, the last of which may be short.

    ``how``: ``visible`` ones alone, squares of the ``reference``, or as ``padded``, ``masked``, ``biased`` (by slabs of
    fewer queries than those of ``slabs``) or ``slabs`` execute.
    """
    last = items_after(WHOLE)
    if how == "padded":  # m rows of zeros before the n of a segment: a triangle of m + n
        whole = triangle(S) * WHOLE + (S + sympify(1) / 2) * sum_of_items(WHOLE) + sum_of_items(WHOLE, power=2) / 2
        return whole + Piecewise((last + 1, Eq(REST, 1)), (Min(REST, 1) * triangle(last + REST), True))
    own = {"visible": triangle, "slabs": own_pairs, "biased": slab_pairs}.get(how)
    if own is not None:
        return WHOLE * own(S) + S * sum_of_items(WHOLE) + own(REST) + REST * last
    squares = WHOLE * S**2 + S * sum_of_items(WHOLE) + REST * (REST + last)
    if how == "reference":
        return squares
    first = Min(T, S)  # has no memory, and needs no mask
    return squares - (first**2 - triangle(first))


def _parameters() -> Expr:
    return block_parameters(9 * linear_parameters(d, d) + 2 * d)


def _state_bytes() -> Expr:
    items, under_way = items_after(WHOLE), Min(REST, 1)
    tail = REST - Min(REST, S - ADDED)
    return L * tensor(B, items + under_way * (4 * items + 2 * REST) + tail, d)


def _sketch(mode: str) -> Cost:
    """The sketch: keys and values of memory and segment, all pairs, a gate over all tokens that nobody uses."""
    later, items = T - Min(T, S), sum_of_items(ceiling(T / S))
    squares = WHOLE * S**2 + REST**2
    second = S * sum_of_items(WHOLE) + REST * items_after(WHOLE)
    factor = 3 if mode == "train" else 1
    terms = {
        "projections": factor * L * (projections(T) + linear(B * items, d, 2 * d)),
        "attention": factor * L * attention(squares + second),
        "cross_projections": factor * L * (linear(B * later, d, 2 * d) + linear(B * items, d, 2 * d)),
        "cross_attention": factor * L * attention(second),
        "ffn": factor * block_ffn(T),
        "gate": L * linear(B * T, d, d),
    }
    return Cost(algorithmic=terms, flops=terms, num_parameters=_parameters(), depth=L * ceiling(T / S))
