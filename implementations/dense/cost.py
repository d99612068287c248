"""Closed forms of dense attention. Derivation in README.md."""

from __future__ import annotations

from collections.abc import Callable

from sympy import Expr, Integer, Min, Piecewise, Rational, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, e, f, h
from ctxbench.cost.terms import (
    FUSED_BACKWARD,
    causal_pairs,
    largest,
    linear,
    linear_parameters,
    tensor,
    when_ffn,
)
from ctxbench.implementations._shared import relative_table
from ctxbench.implementations._shared.backends_table import NAMES
from ctxbench.implementations._shared.decode_table import FEW
from ctxbench.implementations._shared.forms import (
    block_parameters,
    block_terms,
    core_backward,
    kernels,
    position_parameters,
    rotating,
    rotation_tables,
    slab_pairs,
    stack_peak,
)
from ctxbench.implementations._shared.products_forms import own_pairs
from ctxbench.implementations._shared.staircase import BLOCK
from ctxbench.method import ROPE, Params

FUSED = ("blocked", "triton", "flex", *NAMES)


def cost(impl: str, mode: str, causal: bool, position: str, params: Params) -> Cost:
    """One impl in one mode; every pair a causal query cannot see is free only where the impl skips it.

    Rotations and biases act element by element and count nothing; Transformer-XL's term has products of its own.
    """
    own, impl = impl, kernels(impl)
    relative = position == "transformer_xl"
    slabs = impl == "slabs" or (impl == "blocked" and position in ("t5", "alibi", "transformer_xl"))
    visible = causal_pairs(T) if causal else T * T
    tokens: Expr = T
    if mode == "decode":
        tokens, visible = Integer(1), T + 1
        executed = visible
    elif mode == "stream":
        executed = _streamed_rectangles()
        if slabs:
            executed = _streamed_slabs(own_pairs if impl == "slabs" else slab_pairs)
        elif impl == "triton":
            executed = visible
        elif impl == "blocked":
            executed = executed - _first_chunk_saving()
    elif causal and impl == "slabs":
        executed = own_pairs(T)
    elif causal and (slabs or impl == "flex"):
        executed = slab_pairs(T)  # tiles and slabs have the same rows
    else:
        executed = visible if impl in FUSED else T * T
    algorithmic, flops = block_terms(tokens, visible), block_terms(tokens, executed)
    if relative:
        needed, projected, by_distance = _relative(impl, mode, causal, slabs, executed)
        algorithmic |= {"distances": L * linear(needed, d, d), "positions": L * 2 * B * d * visible}
        flops |= {"distances": L * linear(projected, d, d), "positions": L * 2 * B * d * by_distance}
    if mode == "train":
        twice = {"triton": core_backward("triton", position), "fla": core_backward("triton")}  # two kernels
        core = {"reference": 2, **twice}.get(own, FUSED_BACKWARD)
        factor = {"attention": 1 + core, "positions": 4 if slabs else 3, "distances": 2}  # the table is a constant
        if relative and impl == "triton":
            factor["attention"] = factor["positions"] = 1 + Rational(relative_table.BACKWARD, relative_table.FORWARD)
        algorithmic = {term: (2 if term == "distances" else 3) * forward for term, forward in algorithmic.items()}
        flops = {term: factor.get(term, 3) * forward for term, forward in flops.items()}
    known = position in ("none", *ROPE) and impl not in ("slabs", "flex", *NAMES)
    rotation = ("turned" if own == "triton" else "rotated") if position in ROPE else ""
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(4 * linear_parameters(d, d)) + position_parameters(position),
        state_bytes=2 * L * tensor(B, T, d),
        peak_bytes=_peak(impl, mode, causal, rotation) if known else None,
        depth=L,
    )


def _relative(impl: str, mode: str, causal: bool, slabs: bool, executed: Expr) -> tuple[Expr, Expr, Expr]:
    """Distances needed, distances projected, and (query, distance) products of Transformer-XL's term."""
    if mode == "decode":
        return T + 1, T + 1, executed
    if mode == "stream":  # every call projects the distances of all its keys
        whole = floor(T / C)
        return T, C * whole * (whole + 1) / 2 + _present(T - whole * C) * T, executed
    if causal:
        return T, T, executed
    if slabs:  # n queries and T keys are n + T - 1 distances
        whole = floor(T / BLOCK)
        return 2 * T - 1, 2 * T - 1, T * (T - 1) + whole * BLOCK**2 + (T - whole * BLOCK) ** 2
    return 2 * T - 1, 2 * T - 1, executed if impl == "triton" else T * (2 * T - 1)  # two blocks a tile, shared


def _streamed_slabs(own: Callable[[Expr | int], Expr]) -> Expr:
    """Each chunk against all keys before it, and its own staircase."""
    whole = floor(T / C)
    rest = T - whole * C
    return C * C * whole * (whole - 1) / 2 + rest * whole * C + whole * own(C) + own(rest)


def _streamed_rectangles() -> Expr:
    """Pairs of chunks of C queries against all keys so far: full rectangles, the last chunk may be shorter."""
    whole = floor(T / C)
    rest = T - whole * C
    return C * C * whole * (whole + 1) / 2 + rest * T


def _first_chunk_saving() -> Expr:
    """The first chunk has no cache, so the fused kernel skips what lies beyond its diagonal."""
    first = Min(C, T)
    return first * (first - 1) / 2


def _peak(impl: str, mode: str, causal: bool, rotation: str) -> Expr:
    """``rotation``: queries and keys are both ``rotated``, or queries ``turned`` by the kernel that reads them."""
    if mode == "forward":
        return stack_peak(T, _rotated(_mixing(impl, T, T, causal, fresh_keys=True), T, rotation))
    if mode == "train":
        return _train_peak(impl, causal, rotation)
    if mode == "decode":
        return _call_peak(impl, Integer(1), T + 1, rotation, Integer(0), Integer(0))
    whole, rest = floor(T / C) * C, T - floor(T / C) * C
    return largest(
        _present(whole) * _streamed_call_peak(impl, C, whole, rotation),
        _present(rest) * _streamed_call_peak(impl, rest, T, rotation),
    )


def _rotated(mixing: Expr, tokens: Expr, rotation: str) -> Expr:
    """The mixer at its worst: while it rotates, or with the tables that queries wait with to be turned."""
    if rotation == "turned":
        return mixing + rotation_tables(tokens)
    return largest(mixing, rotating(tokens)) if rotation else mixing


def _streamed_call_peak(impl: str, tokens: Expr, keys: Expr, rotation: str) -> Expr:
    """The caches before and after the call are alive together, and so is the output of the call before it."""
    before = 2 * tensor(B, keys - tokens, d)
    return _call_peak(impl, tokens, keys, rotation, L * before, _present(keys - tokens) * tensor(B, C, d))


def _present(count: Expr) -> Expr:
    """1 where there is at least one, else 0; SymPy handles it far faster than a condition."""
    return Min(count, 1)


def _call_peak(impl: str, tokens: Expr, keys: Expr, rotation: str, before: Expr, earlier: Expr) -> Expr:
    row, after = tensor(B, tokens, d), 2 * tensor(B, keys, d)
    mixing = _mixing(impl, tokens, keys, causal=True, fresh_keys=False)
    feed = when_ffn(2 * row + 2 * tensor(B, tokens, f))
    if rotation == "turned":
        mixing = _rotated(mixing, tokens, rotation)
        if tokens == 1:  # beside the log-sum-exp the turned query, where its keys are split
            mixing += Piecewise((4 * B * h, keys > 2 * FEW), (0, True))
    early = [rotating(tokens)] * (rotation == "rotated")  # before they are cached
    worst = largest(after + mixing, after + feed, *early)
    return before + earlier + (L - 1) * after + worst + Min(L - 1, 1) * row


def _mixing(impl: str, tokens: Expr, keys: Expr, causal: bool, fresh_keys: bool) -> Expr:
    """Bytes inside the mixer at its worst. ``fresh_keys``: k and v are its own, not part of a cache."""
    row = tensor(B, tokens, d)
    own = 2 * row + (2 * row if fresh_keys else 0)  # norm and q; k and v
    if impl in FUSED:  # output and fp32 log-sum-exp, then output and its projection
        # Beside a cache SDPA has a mask, kept as booleans and in the dtype.
        masked = _present(keys - tokens) * _present(tokens - 1) * (e + 1) * tokens * keys * int(impl == "blocked")
        return own + row + largest(row, 4 * B * h * tokens + masked)
    scores, mask = tensor(B, h, tokens, keys), tokens * keys if causal else Integer(0)
    # Scores and masked scores beside the mask and its inverse; then scores, probabilities, mask and output, with a
    # copy of v where the batch keeps its heads from being one dimension of a batched product.
    copied = Min(B - 1, 1) * row if fresh_keys else Integer(0)
    return own + 2 * scores + mask + largest(mask, row + copied)


def _train_peak(impl: str, causal: bool, rotation: str) -> Expr:
    """The top layer's backward pass, in its FFN or in its attention.

    Holds while a layer's activations outweigh its weights, about T > d: then lower layers free more than their
    gradients take.
    """
    row, hidden, statistics = tensor(B, T, d), tensor(B, T, f), 2 * e * B * T
    scores, mask = tensor(B, h, T, T), T * T if causal else Integer(0)
    core = 4 * B * h * T if impl in FUSED else scores + mask  # log-sum-exp; probabilities and mask
    tables = {"rotated": 2, "turned": 1}.get(rotation, 0) * rotation_tables(T)
    # Of rotated queries the fused kernels' output has heads apart, which merging copies.
    merged = row if rotation == "rotated" and impl in FUSED else Integer(0)
    kept = (
        core + tables + merged + 6 * row + statistics + when_ffn(2 * row + 2 * hidden + statistics)
    )  # norm q k v o, output; FFN's
    in_ffn = when_ffn(kept + hidden + e * (d * f + d))
    # Attention: the FFN's part is freed but for its gradients, and the gradient of the residual is alive.
    gradients = e * (d * d + d) + when_ffn(row + e * (2 * d * f + f + 3 * d))
    if impl in FUSED:  # norm q k v o, output; gradients of o, q, k and v
        in_attention = core + tables + 10 * row + statistics + gradients
    else:  # norm q k, output, gradient of v; gradients of the probabilities and of the scores
        in_attention = core + tables + 5 * row + 2 * scores + statistics + gradients
    return (L - 1) * kept + largest(in_ffn, in_attention)
