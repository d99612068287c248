"""Closed forms of the compressive memory. Derivation in README.md."""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Integer, Min, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d
from ctxbench.cost.terms import attention, linear, linear_parameters, projections, tensor, triangle
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    position_parameters,
    slab_pairs,
)
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations.compressive_memory import peaks
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams
from ctxbench.implementations.compressive_memory.sizes import (
    RATE,
    REST,
    WHOLE,
    N,
    R,
    S,
    compressions,
    made,
    retrieved,
    retrieved_before,
)

PLACE = 4  # bytes of the place of a retrieved row, from which a bias has its distance


def cost(impl: str, mode: str, causal: bool, position: str, params: CompressiveMemoryParams) -> Cost | None:
    """One impl in one mode; None for the sketch, whose work depends on what it finds most similar."""
    if impl == "as_written":
        return None
    biased = position in ("t5", "alibi")
    by_slabs = {"blocked": slab_pairs} if biased else {}
    own = {"slabs": own_pairs, "triton": triangle, **by_slabs}.get(impl, lambda n: n * n)
    flops, algorithmic = _forward(mode, params, own), _forward(mode, params, triangle)
    if mode == "train":
        core = core_backward(impl)
        flops, algorithmic = (_trained(*pair, params) for pair in ((flops, core), (algorithmic, Integer(2))))
    found = retrieved(WHOLE) * N
    state = tensor(B, made(T, WHOLE * S) + 2 * (found + REST), d)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(5 * d * d + 2 + _compressor(params)) + position_parameters(position),
        state_bytes=L * (state + (PLACE * B * found if biased else 0)),
        peak_bytes=peaks.peak(impl, mode, params) if position == "none" else None,
        depth=L if mode == "decode" or (impl != "reference" and mode != "stream") else L * ceiling(T / S),
    )


def _forward(mode: str, params: CompressiveMemoryParams, own: Callable[[Expr], Expr]) -> dict[str, Expr]:
    """By term; ``own``: pairs of n tokens of a segment among themselves."""
    if mode == "decode":
        tokens: Expr = Integer(1)
        pairs = retrieved(WHOLE) * N + REST + 1
        turns = floor((T + 1) / S) - WHOLE
        reads = turns * retrieved(WHOLE + 1)
        new = compressions((WHOLE + turns) * S) - compressions(WHOLE * S)
    else:
        tokens = T
        pairs = S * N * retrieved_before(WHOLE) + WHOLE * own(S) + REST * N * retrieved(WHOLE) + own(REST)
        turns, reads = _segments(mode) - 1, retrieved_before(_segments(mode))
        new = compressions(turns * S)
    if not params.compressed_len:
        new = Integer(0)
    return {
        "projections": L * projections(tokens),
        "attention": L * attention(pairs),
        "retrieved": L * reads * linear(B * N, d, 2 * d),
        "question": L * turns * linear(B, d, d),
        "compression_in": L * new * linear(B * N, RATE * d, 2 * d),
        "compression_out": L * new * linear(B * N, 2 * d, d),
        "ffn": block_ffn(tokens),
    }


def _segments(mode: str) -> Expr:
    """Segments for which items are retrieved, the first included; a stream is ready for what follows."""
    return WHOLE + 1 if mode == "stream" else ceiling(T / S)


def _trained(forward: dict[str, Expr], core: Expr, params: CompressiveMemoryParams) -> dict[str, Expr]:
    """Forward and backward.

    Tokens in memory get no gradient, so their maps cost twice. Entries lead to the weights of the compression: where a
    segment may choose among them, the maps of what it retrieves cost three times.
    """
    learning = Integer(0)
    if params.compressed_len:
        segments = _segments("train")
        learning = retrieved_before(segments) - retrieved_before(Min(segments, floor(R / S) + 1))
    factors = {"attention": 1 + core, "retrieved": 2, "question": 2, "compression_in": 2}
    found = {term: factors.get(term, 3) * each for term, each in forward.items()}
    found["retrieved"] += L * learning * linear(B * N, d, 2 * d)
    return found


def _compressor(params: CompressiveMemoryParams) -> Expr:
    if not params.compressed_len:
        return Integer(0)
    return linear_parameters(RATE * d, 2 * d) + linear_parameters(2 * d, d)
