"""Closed forms of Transformer-XL. Derivation in README.md.

Segment number t has ``m_t`` memory rows: ``min(t S, M)`` from an empty start, M from zeros. Every sum over segments
is N whole ones and a rest of ``T mod S`` tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from sympy import Expr, Integer, Max, Min, Piecewise, Rational, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, h, param
from ctxbench.cost.terms import FUSED_BACKWARD, linear, projections, tensor, triangle, window_pairs
from ctxbench.implementations._shared import relative_table
from ctxbench.implementations._shared.forms import block_ffn, block_parameters
from ctxbench.implementations._shared.staircase import BLOCK
from ctxbench.implementations.transformer_xl import peak
from ctxbench.implementations.transformer_xl.params import TransformerXLParams

S, M = param("segment_len"), param("mem_len")
WHOLE = floor(T / S)
REST = T - WHOLE * S
BACKWARD = {  # of the attention products, per forward
    "reference": 2,
    "blocked": Rational(8, 3),
    "native": Integer(0),  # by kernels of its own
    "triton": Rational(relative_table.BACKWARD, relative_table.FORWARD),
    "as_written": 2,
    "flex": FUSED_BACKWARD,
}


class Segments(NamedTuple):
    """``count`` calls or segments of ``rows`` queries, with ``memory`` rows before them in sum.

    ``full``: how many of them have all M rows.
    """

    rows: Expr
    count: Expr
    memory: Expr
    full: Expr

    @property
    def keys(self) -> Expr:
        """Rows of memory and segment, in sum."""
        return self.rows * self.count + self.memory

    @property
    def rectangles(self) -> Expr:
        """Pairs of all queries and all keys of their segment."""
        return self.rows * self.keys

    @property
    def visible(self) -> Expr:
        """Pairs up to each query's own token."""
        return triangle(self.rows) * self.count + self.rows * self.memory

    @property
    def blocks(self) -> Expr:
        """Pairs of the blocked schedule: of the segment's own keys, those up to the block's end."""
        whole = floor(self.rows / BLOCK)
        own = BLOCK**2 * triangle(whole) + (self.rows - whole * BLOCK) * self.rows
        return own * self.count + self.rows * self.memory


def cost(impl: str, mode: str, causal: bool, position: str, params: TransformerXLParams) -> Cost:
    """One impl in one mode."""
    flops = _flops(impl, mode, params)
    algorithmic = flops if impl == "as_written" else _algorithmic(mode, params)
    if mode == "train":
        once = ("positions",)  # the table of distances is a constant: only the weight has a gradient
        algorithmic = {term: forward * (2 if term in once else 3) for term, forward in algorithmic.items()}
        backward = {"positions": 1, "attention": BACKWARD[impl]}
        flops = {term: forward * (1 + backward.get(term, 2)) for term, forward in flops.items()}
        if impl == "native":  # whose backward pass is that of blocked
            flops["attention"] += BACKWARD["blocked"] * _flops("blocked", mode, params)["attention"]
        if impl == "flex":  # the product is not computed again, and zeros want no gradient
            flops["attention"] -= L * (FUSED_BACKWARD - 2) * _flex_core(params)[1]
            flops["projections"] -= L * 2 * linear(B * _zeros(params), d, d)
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(5 * d * d + 2 * d),
        state_bytes=L * tensor(B, Min(T, M) if impl == "as_written" else _state_rows(params), d),
        peak_bytes=None if impl == "flex" else _peak(impl, mode, params),
        depth=_depth(impl, mode),
    )


def _algorithmic(mode: str, params: TransformerXLParams) -> dict[str, Expr]:
    """Every token projected once, every distance once for all calls, every visible pair once."""
    if mode == "decode":
        keys = _state_rows(params) + 1
        pairs = Min(keys, M) if params.same_length else keys
        return _terms(projections(1), Integer(0), 6 * B * d * pairs, Integer(1))
    return _terms(projections(T), linear(_longest(params), d, d), 6 * B * d * _visible(params), T)


def _visible(params: TransformerXLParams) -> Expr:
    """Pairs of a query and a key that it sees, over the whole sequence."""
    if params.same_length:
        return window_pairs(T, M) if params.start == "empty" else T * M
    return sum((part.visible for part in _sequence(params)), Integer(0))


def _flops(impl: str, mode: str, params: TransformerXLParams) -> dict[str, Expr]:
    """Forward FLOPs of what the impl executes, by term."""
    parts: tuple[Segments, ...] = _sequence(params)
    tokens: Expr = Integer(1) if mode == "decode" else T
    if mode == "decode":
        rows = Min(T, M) if impl == "as_written" else _state_rows(params)
        if impl == "blocked":
            rows = Min(rows, M - 1) if params.same_length else rows
            return _terms(*_single(Segments(tokens, tokens, rows, Integer(0)), params), tokens)
        parts = (Segments(tokens, tokens, rows, Integer(0)),)
    if impl == "as_written":
        if mode in ("forward", "train"):
            parts = (Segments(T, Integer(1), Integer(0), Integer(0)),)
        pairs, keys = sum(part.rectangles for part in parts), sum(part.keys for part in parts)
        return _terms(_projected(tokens, keys), Integer(0), 4 * B * d * pairs, tokens)
    if impl == "reference":
        pairs, keys = sum(part.rectangles for part in parts), sum(part.keys for part in parts)
        return _terms(_projected(tokens, keys), linear(keys, d, d), 6 * B * d * pairs, tokens)
    if impl == "flex":
        return _terms(_projected(T, T + _zeros(params)), linear(_longest(params), d, d), sum(_flex_core(params)), T)
    if impl in ("triton", "native"):
        keys, distances = sum(part.keys for part in parts), _longest(params)
        if mode != "stream":
            keys = T + (M if params.start == "zeros" else 0)
        return _terms(
            _projected(T, keys), linear(keys if mode == "stream" else distances, d, d), 6 * B * d * _visible(params), T
        )
    if mode == "stream":
        calls = [_call(part, params) for part in parts]
        sums = [sum(terms) for terms in zip(*calls, strict=True)]
        return _terms(*sums, tokens)  # type: ignore[call-arg]
    zeros = _zeros(params)
    batch = _terms(
        _projected(T, T + zeros),
        linear(_longest(params), d, d),
        6 * B * d * sum(part.blocks for part in parts),
        T,
    )
    if mode == "train":
        return batch
    first = Segments(Integer(1), Integer(1), zeros, Integer(1 if params.start == "zeros" else 0))
    alone = _terms(*_single(first, params), Integer(1))
    return {term: Piecewise((alone[term], sympify(T) <= 1), (batch[term], True)) for term in batch}


def _flex_core(params: TransformerXLParams) -> tuple[Expr, Expr]:
    """Forward FLOPs of a layer's attention by tiles, and of the product of queries and distances ahead of it."""
    return 4 * B * d * sum(part.blocks for part in _sequence(params)), 2 * B * d * T * _longest(params)


def _zeros(params: TransformerXLParams) -> Expr:
    """Rows that a sequence finds before it."""
    return M if params.start == "zeros" else Integer(0)


def _call(part: Segments, params: TransformerXLParams) -> tuple[Expr, Expr, Expr]:
    """Projections, positions and attention of calls of the blocked impl, each with the rows its state brings."""
    batch = (
        _projected(part.rows * part.count, part.keys),
        linear(part.keys, d, d),
        6 * B * d * part.blocks,
    )
    single = _single(part, params)
    return tuple(  # type: ignore[return-value]
        Piecewise((alone, part.rows <= 1), (together, True)) for alone, together in zip(single, batch, strict=True)
    )


def _single(part: Segments, params: TransformerXLParams) -> tuple[Expr, Expr, Expr]:
    """Calls of one token, whose query takes over the projections of keys, values and distances."""
    tokens = part.rows * part.count
    keys = part.keys - (part.full if params.same_length else 0)
    return projections(tokens), linear(B * tokens, d, d), 6 * B * h * d * keys


def _terms(projected: Expr, positions: Expr, attention: Expr, tokens: Expr) -> dict[str, Expr]:
    return {
        "projections": L * projected,
        "positions": L * positions,
        "attention": L * attention,
        "ffn": block_ffn(tokens),
    }


def _projected(queries: Expr, keys: Expr) -> Expr:
    """Queries and output of some rows, keys and values of others."""
    return 2 * linear(B * queries, d, d) + 2 * linear(B * keys, d, d)


def _sequence(params: TransformerXLParams) -> tuple[Segments, Segments]:
    """The whole segments and the rest; a rest of 0 rows counts nothing."""
    some = Min(REST, 1)
    if params.start == "zeros":
        return Segments(S, WHOLE, WHOLE * M, WHOLE), Segments(REST, some, M * some, some)
    ramp = Min(WHOLE, floor(M / S) + 1)
    remembered = S * triangle(ramp - 1) + (WHOLE - ramp) * M
    full = WHOLE - Min(WHOLE, ceiling(M / S))
    filled = Piecewise((some, WHOLE * S >= M), (0, True))
    return Segments(S, WHOLE, remembered, full), Segments(REST, some, Min(WHOLE * S, M) * some, filled)


def _longest(params: TransformerXLParams) -> Expr:
    """Most keys a segment of the sequence has."""
    if params.start == "zeros":
        return M + Min(S, T)
    return Max(Min(WHOLE * S - S, M) + S, Min(WHOLE * S, M) + REST)


def _state_rows(params: TransformerXLParams, tokens: Expr = T) -> Expr:
    """Rows a layer carries after some tokens: the memory and the segment so far."""
    rows = M + tokens - floor(tokens / S) * S
    return rows if params.start == "zeros" else Min(tokens, rows)


def _peak(impl: str, mode: str, params: TransformerXLParams) -> Expr:
    if mode in ("forward", "train"):
        return getattr(peak, mode)(impl, _whole_shape(impl, params))
    if mode == "stream":
        tokens = Min(S, T)
        past = _longest(params) - tokens
        after = Min(past + tokens, M)
    else:
        tokens = Integer(1)
        past = Min(T, M) if impl == "as_written" else _state_rows(params)
        after = _state_rows(params, T + 1)
    keys = past + tokens
    shape = peak.Shape(tokens, past, tokens, past, keys, tokens * keys, Integer(1), after)
    return getattr(peak, mode)(impl, shape)


def _whole_shape(impl: str, params: TransformerXLParams) -> peak.Shape:
    """A call without state."""
    parts: tuple[Segments, ...] = _sequence(params)
    if impl == "as_written":
        parts = (Segments(T, Integer(1), Integer(0), Integer(0)),)
    past = _zeros(params)
    rows, longest = Min(S, T), _longest(params)
    keys, rectangles = sum(part.keys for part in parts), sum(part.rectangles for part in parts)
    return peak.Shape(T, past, rows, longest - rows, keys, rectangles, parts[0].full, Integer(0))


def _depth(impl: str, mode: str) -> Expr:
    """Calls follow one another, as do the segments of the loop; a layer of the one-shot form is one step."""
    looped = mode == "stream" or (impl == "reference" and mode in ("forward", "train"))
    return L * ceiling(T / S) if looped else L
