"""Closed forms of the Compressive Transformer. Derivation in README.md."""

from __future__ import annotations

from typing import NamedTuple

from sympy import Expr, Integer, Max, Piecewise, Rational, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, e, h
from ctxbench.cost.terms import linear, linear_parameters, projections, tensor
from ctxbench.implementations._shared import relative_table
from ctxbench.implementations._shared.forms import block_ffn, block_parameters
from ctxbench.implementations.compressive_transformer import peaks, sizes
from ctxbench.implementations.compressive_transformer.params import DILATIONS, KERNEL, CompressiveTransformerParams
from ctxbench.implementations.compressive_transformer.sizes import LAST, ONE, RATE, WHOLE, S, Segments

BACKWARD = {  # of the attention products, per forward
    "reference": 2,
    "blocked": Rational(8, 3),
    "native": Integer(0),  # by kernels of its own
    "triton": Rational(relative_table.BACKWARD, relative_table.FORWARD),
}


FUSED = ("triton", "native")  # multiply visible pairs alone, and one token like all others


class Work(NamedTuple):
    """FLOPs of one layer, forward. ``entries`` are keys and values of compressed rows in the one-shot form."""

    projections: Expr
    entries: Expr
    positions: Expr
    attention: Expr
    compression: Expr


def cost(impl: str, mode: str, causal: bool, position: str, params: CompressiveTransformerParams) -> Cost:
    """One impl in one mode."""
    executed, needed = _work(impl, mode, params), _needed(mode, params)
    tokens = ONE if mode == "decode" else T
    flops, algorithmic = ({**_terms(work), "ffn": block_ffn(tokens)} for work in (executed, needed))
    if mode == "train":
        algorithmic = _trained(algorithmic, needed, Integer(2), params)
        flops = _trained(flops, executed, BACKWARD[impl], params)
        if impl == "native":  # whose backward pass is that of blocked
            flops["attention"] += L * BACKWARD["blocked"] * _work("blocked", mode, params).attention
    rows = sizes.state_rows()
    carried = tensor(B, rows + sizes.state_entries(), d)
    if params.compression == "most_used" and params.compressed_len:
        carried += Max(e, 4) * B * rows
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(5 * d * d + 2 * d + _weights(params)),
        state_bytes=L * carried,
        peak_bytes=peaks.peak(impl, mode, params, _weights(params)),
        depth=_depth(impl, mode),
    )


def _terms(work: Work) -> dict[str, Expr]:
    return {
        "projections": L * (work.projections + work.entries),
        "positions": L * work.positions,
        "attention": L * work.attention,
        "compression": L * work.compression,
    }


def _trained(
    forward: dict[str, Expr], work: Work, attention: Expr, params: CompressiveTransformerParams
) -> dict[str, Expr]:
    """Forward and backward. The table is a constant, entries too: only their maps' weights get a gradient."""
    return {
        "projections": L * (3 * work.projections + 2 * work.entries),
        "positions": 2 * forward["positions"],
        "attention": (1 + attention) * forward["attention"],
        "compression": forward["compression"],
        "ffn": 3 * forward["ffn"],
        "auxiliary": L * _auxiliary(params),
    }


def _needed(mode: str, params: CompressiveTransformerParams) -> Work:
    """Every token and entry projected once, every distance once for all calls, every visible pair once."""
    if mode == "decode":
        keys = sizes.state_rows() + sizes.state_entries() + 1
        return Work(projections(1), Integer(0), Integer(0), 6 * B * d * keys, _compress(_leaving(), params))
    gone = sizes.evicted(WHOLE * S) if mode == "stream" else sizes.evicted(LAST)
    pairs = sum(part.visible for part in sizes.sequence())
    compressed = linear(B * sizes.evicted(LAST) / RATE, d, 2 * d) if params.compressed_len else Integer(0)
    return Work(projections(T), compressed, linear(sizes.longest(), d, d), 6 * B * d * pairs, _compress(gone, params))


def _work(impl: str, mode: str, params: CompressiveTransformerParams) -> Work:
    """What the impl executes."""
    if mode == "decode":
        alone = Segments(ONE, ONE, sizes.state_rows() + sizes.state_entries())
        work = _segment_by_segment((alone,)) if impl == "reference" else _single(alone)
        return work._replace(compression=_compress(_leaving(), params))
    parts = sizes.sequence()
    if mode == "stream":
        gone = sizes.evicted(WHOLE * S)
        work = _segment_by_segment(parts) if impl == "reference" else _calls(parts, impl)
        return work._replace(compression=_compress(gone, params))
    gone = sizes.evicted(LAST)
    if impl == "reference":
        return _segment_by_segment(parts)._replace(compression=_compress(gone, params))
    pairs = sum(part.visible if impl in FUSED else part.blocks for part in parts)
    entries = linear(B * gone / RATE, d, 2 * d) if params.compressed_len else Integer(0)
    whole = Work(projections(T), entries, linear(sizes.longest(), d, d), 6 * B * d * pairs, _compress(gone, params))
    if mode == "train" or impl in FUSED:
        return whole
    return _either(T, _single(Segments(ONE, ONE, Integer(0))), whole)


def _segment_by_segment(parts: tuple[Segments, ...]) -> Work:
    """The loop: rows before a segment are projected again, and every key is multiplied with every query."""
    queries, keys = sum(part.rows * part.count for part in parts), sum(part.keys for part in parts)
    pairs = sum(part.rectangles for part in parts)
    projected = linear(B * queries, d, 2 * d) + linear(B * keys, d, 2 * d)
    return Work(projected, Integer(0), linear(keys, d, d), 6 * B * d * pairs, Integer(0))


def _calls(parts: tuple[Segments, ...], impl: str) -> Work:
    """The one-shot form a segment a call: each projects what its state brings."""
    found = []
    for part in parts:
        pairs = part.visible if impl in FUSED else part.blocks
        work = _segment_by_segment((part,))._replace(attention=6 * B * d * pairs)
        found.append(work if impl in FUSED else _either(part.rows, _single(part), work))
    return Work(*(sum(terms) for terms in zip(*found, strict=True)))


def _single(part: Segments) -> Work:
    """Calls of one token, whose query takes over the projections of keys, values and distances."""
    tokens = part.rows * part.count
    zero = Integer(0)
    return Work(projections(tokens), zero, linear(B * tokens, d, d), 6 * B * h * d * part.keys, zero)


def _either(tokens: Expr, alone: Work, together: Work) -> Work:
    return Work(*(Piecewise((a, tokens <= 1), (b, True)) for a, b in zip(alone, together, strict=True)))


def _leaving() -> Expr:
    """Rows that leave the memory when the token after T is the last of its segment."""
    return sizes.evicted(floor((T + 1) / S) * S) - sizes.evicted(WHOLE * S)


def _compress(rows: Expr, params: CompressiveTransformerParams) -> Expr:
    """FLOPs of compressing ``rows`` rows."""
    return B * rows * _maps(params) * d * d if params.trained else Integer(0)


def _maps(params: CompressiveTransformerParams) -> int:
    """FLOPs of a compression with weights, a row, in d^2."""
    return 2 + (2 * KERNEL * len(DILATIONS) if params.compression == "dilated_conv" else 0)


def _auxiliary(params: CompressiveTransformerParams) -> Expr:
    """The loss of every compression and its gradients, of one layer; compressing the rows a second time included."""
    if not params.trained or params.auxiliary == "none":
        return Integer(0)
    gone, times = sizes.evicted(LAST), sizes.compressions()
    maps = _maps(params)
    # The first map of the compression has no gradient to hand on.
    first = 2 * KERNEL if params.compression == "dilated_conv" else 2
    compression = B * gone * (3 * maps - first) * d * d
    if params.auxiliary == "auto_encoding":
        return compression + 3 * linear(B * gone, d, d)
    exact = linear(B * S * times, d, d) + linear(B * gone, d, 2 * d) + 4 * B * d * S * gone
    return compression + exact + 2 * linear(B * gone / RATE, d, 2 * d) + 10 * B * d * S * gone / RATE


def _weights(params: CompressiveTransformerParams) -> Expr:
    """Parameters of the compression, and of the decoder of auto-encoding."""
    if not params.trained:
        return Integer(0)
    count = linear_parameters(RATE * d, d)
    if params.compression == "dilated_conv":
        count += len(DILATIONS) * linear_parameters(KERNEL * d, d)
    return count + (linear_parameters(d, RATE * d) if params.auxiliary == "auto_encoding" else 0)


def _depth(impl: str, mode: str) -> Expr:
    """Calls follow one another, as do the segments of the loop; a layer of the one-shot form is one step."""
    looped = mode == "stream" or (impl == "reference" and mode in ("forward", "train"))
    return L * ceiling(T / S) if looped else L
