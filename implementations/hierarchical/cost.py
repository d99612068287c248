"""Closed forms of hierarchical attention: FLOPs, parameters and state. Derivation in README.md; ``peaks.py`` has peaks.

The causal forms treat the window as a scale of cells of one token: all counts are sums over scales.
"""

from __future__ import annotations

from math import gcd

from sympy import Expr, Integer, Max, Min, ceiling, floor, sympify

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d
from ctxbench.cost.terms import attention, linear, linear_parameters, projections, tensor
from ctxbench.implementations._shared.flex_table import TILE
from ctxbench.implementations._shared.forms import block_ffn, block_parameters, kernels, position_parameters, trained
from ctxbench.implementations.hierarchical.params import HierarchicalParams, Scale, slab_rows
from ctxbench.implementations.hierarchical.peaks import peak
from ctxbench.implementations.hierarchical.sizes import first, keeps, most, shown
from ctxbench.method import ROPE

SEGMENT = 512  # tokens a call in stream mode


def cost(impl: str, mode: str, causal: bool, position: str, params: HierarchicalParams) -> Cost:
    """One impl in one mode; the direction follows from the form. Exact at every length."""
    tokens = Integer(1) if mode == "decode" else T
    if params.form == "seed":
        algorithmic = _branches([ceiling(T / span) for span in params.spans], [T for _ in params.spans[1:]])
    else:
        visible = sum((_visible(scale, mode) for scale in params.scales), Integer(0))
        algorithmic = {"projections": L * projections(tokens), "attention": L * attention(visible)}
    algorithmic["ffn"] = block_ffn(tokens)
    flops = {**algorithmic, **_executed(kernels(impl), mode, params)}
    if impl == "as_written" and params.form != "seed":
        flops = {term: flops[term] for term in ("projections", "attention", "upsampling", "fusion", "ffn")}
    if mode == "train":
        algorithmic, flops = trained(algorithmic), trained(flops, impl)
    branched = params.form == "seed" or impl == "as_written"
    rotates = position in ROPE
    turned = rotates and mode in ("forward", "train") and impl in ("blocked", "native") and params.form != "seed"
    known = (
        (position == "none" or turned)
        and not (kernels(impl) == "triton" and params.form == "seed")
        and impl != "flex"
        and not params.disjoint
        and not (branched and mode in ("stream", "decode"))
    )
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(_branch_parameters(params) if branched else 4 * linear_parameters(d, d))
        + position_parameters(position),
        state_bytes=Integer(0) if branched else _state_bytes(params),
        peak_bytes=peak(kernels(impl), mode, params, rotates) if known else None,
        depth=L,
    )


def _executed(impl: str, mode: str, params: HierarchicalParams) -> dict[str, Expr]:
    """The terms in which an impl does more than the mathematics needs."""
    if impl == "as_written":  # whole cells only, and attention among the B samples of a batch
        cells = [floor(T / span) for span in params.spans]
        return _branches(cells, [count * span for count, span in zip(cells, params.spans, strict=True)][1:], of=B)
    if params.form == "seed":
        cells = [ceiling(T / span) for span in params.spans]
        return _branches(cells, [count * span for count, span in zip(cells, params.spans, strict=True)][1:])
    pairs: Expr = Integer(0)
    for scale in params.scales:
        if impl == "triton":
            pairs += _visible(scale, mode)
        elif impl == "flex":
            pairs += _tiles(scale)
        elif mode == "decode":
            pairs += _visible(scale, mode) if impl == "blocked" else keeps(scale, T) + _new(scale, T, T + 1)
        elif mode == "stream":
            pairs += _streamed_slabs(scale, params) if impl == "blocked" else _streamed_rectangles(scale)
        else:
            pairs += (
                _slabs(scale, slab_rows(params.scales), Integer(0)) if impl == "blocked" else T * floor(T / scale.span)
            )
    return {"attention": L * attention(pairs)}


def _branches(cells: list[Expr], restored: list[Expr], of: Expr | None = None) -> dict[str, Expr]:
    """One layer's branches over ``cells``; each cell attends to ``of`` others, or to all of its scale."""
    pairs = sum((count * (count if of is None else of) for count in cells), Integer(0))
    return {
        "projections": L * projections(sum(cells, Integer(0))),
        "attention": L * attention(pairs),
        "upsampling": L * linear(B * sum(restored, Integer(0)), d, d),
        "fusion": L * linear(B * T, len(cells) * d, d),
    }


def _branch_parameters(params: HierarchicalParams) -> Expr:
    branches = params.levels * 4 * linear_parameters(d, d)
    up = sum((linear_parameters(d, d * span) - d * (span - 1) for span in params.spans[1:]), Integer(0))
    return branches + up + linear_parameters(params.levels * d, d)


def _state_bytes(params: HierarchicalParams) -> Expr:
    """Keys and values of what later tokens see, and of the sum of each coarse scale's open cell."""
    cells = sum((keeps(scale, T) for scale in params.scales), Integer(params.levels - 1))
    return 2 * L * tensor(B, cells, d)


def _visible(scale: Scale, mode: str) -> Expr:
    """Pairs of tokens and cells of one scale: token i sees ``min(most, floor((i + 1) / s))``."""
    if scale.behind or scale.handed is not None:
        return _visible_apart(scale, mode)
    if mode == "decode":
        complete = floor((T + 1) / scale.span)
        return complete if scale.most is None else Min(most(scale), complete)
    complete = floor(T / scale.span)
    m = complete if scale.most is None else Min(most(scale), complete)
    return scale.span * m * (m - 1) / 2 + m * (T - m * scale.span + 1)


def _visible_apart(scale: Scale, mode: str) -> Expr:
    """The same where scales are disjoint: what a token sees or has left behind, less what it has left behind."""
    if mode == "decode":
        return shown(scale, T + 1) - first(scale, T + 1)
    left: Expr = Integer(0)
    if scale.handed is not None:
        left = scale.group * _floors(T - scale.handed, scale.span * scale.group)
    elif scale.most is not None:
        left = _floors(T - scale.behind - most(scale) * scale.span, scale.span)
    return _floors(T - scale.behind, scale.span) - left


def _floors(last: Expr, span: int) -> Expr:
    """Sum of ``floor(n / span)`` over n = 1 .. last; 0 where there is none."""
    last = Max(0, last)
    whole = floor(last / span)
    return span * whole * (whole - 1) / 2 + whole * (last - whole * span + 1)


def _new(scale: Scale, before: Expr, after: Expr) -> Expr:
    """Cells that tokens ``before`` to ``after - 1`` complete."""
    return floor(after / scale.span) - floor(before / scale.span)


def _slabs(scale: Scale, step: int, start: Expr) -> Expr:
    """Pairs of slabs of ``step`` queries that cover tokens ``start`` to T - 1, and the cells that any of them sees."""
    whole = floor((T - start) / step)
    rest, last = T - start - whole * step, start + whole * step
    ends = step * _ramp_of_shown(scale, whole, start + step, step) + rest * shown(scale, T)
    return ends - step * _ramp_of_first(scale, whole, start + 1, step) - rest * first(scale, last + 1)


def _tiles(scale: Scale) -> Expr:
    """Pairs in the tiles of TILE x TILE that block lists keep: all tokens and cells that any query of a tile sees.

    ``ceil(floor(x / s) / TILE) = floor((x + (TILE - 1) s) / (TILE s))``, and so for the first tile.
    """
    side, span = Integer(TILE), TILE * scale.span
    whole = floor(T / side)
    rest, up = T - whole * side, (TILE - 1) * scale.span - scale.behind
    ends = side * _ramp(whole, side + up, TILE, span, clamp=up < 0) + rest * Max(0, floor((T + up) / span))
    if scale.handed is None and scale.most is None:
        return side * ends
    back = scale.handed if scale.handed is not None else scale.behind + most(scale) * scale.span
    begins = side * _ramp(whole, 1 - back, TILE, span, clamp=True)
    return side * (ends - begins - rest * Max(0, floor((whole * side + 1 - back) / span)))


def _streamed_slabs(scale: Scale, params: HierarchicalParams) -> Expr:
    """The same over calls of SEGMENT tokens: slab by slab of the whole calls, then the last, shorter call."""
    calls, step = floor(T / SEGMENT), slab_rows(params.scales)
    total = _slabs(scale, step, calls * SEGMENT)
    for begin in range(0, SEGMENT, step):
        end = min(begin + step, SEGMENT)
        total += (end - begin) * _ramp_of_shown(scale, calls, Integer(end), SEGMENT)
        total -= (end - begin) * _ramp_of_first(scale, calls, Integer(begin + 1), SEGMENT)
    return total


def _streamed_rectangles(scale: Scale) -> Expr:
    """Pairs of calls of SEGMENT tokens and all cells at hand: those remembered and those the call completes.

    ``min(n, keep) + n' - n = n' - max(0, n - keep)`` with n and n' complete cells before and after a call.
    """
    calls = floor(T / SEGMENT)
    start, span = calls * SEGMENT, scale.span
    total = SEGMENT * _ramp(calls, Integer(SEGMENT), SEGMENT, span) + (T - start) * floor(T / span)
    if scale.behind or scale.handed is not None:
        own = int(span == 1)
        dropped = SEGMENT * _ramp_of_first(scale, calls, Integer(own), SEGMENT)
        return total - dropped - (T - start) * first(scale, start + own)
    if scale.most is None:
        return total
    keep = most(scale) - int(span == 1)
    dropped = SEGMENT * _ramp(calls, Integer(0), SEGMENT, span, keep, clamp=True)
    return total - dropped - (T - start) * Max(0, floor(start / span) - keep)


def _ramp_of_shown(scale: Scale, count: Expr, begin: Expr, stride: int) -> Expr:
    """Sum over b < count of the cells that are seen or left behind after ``begin + b * stride`` tokens."""
    return _ramp(count, begin - scale.behind, stride, scale.span, clamp=scale.behind > 0)


def _ramp_of_first(scale: Scale, count: Expr, begin: Expr, stride: int) -> Expr:
    """Sum over b < count of the cells that are left behind after ``begin + b * stride`` tokens."""
    if scale.handed is not None:
        return scale.group * _ramp(count, begin - scale.handed, stride, scale.span * scale.group, clamp=True)
    if scale.most is None:
        return Integer(0)
    return _ramp(count, begin - scale.behind, stride, scale.span, most(scale), clamp=True)


def _ramp(count: Expr, begin: Expr, stride: int, span: int, less: Expr | int = 0, clamp: bool = False) -> Expr:
    """Sum over b < count of ``max(0, floor((begin + b * stride) / span) - less)``; no term is negative without clamp.

    Every ``period`` strides are whole cells, so each residue of b is an arithmetic sequence.
    """
    period = span // gcd(stride, span)
    slope = stride * period // span
    total: Expr = Integer(0)
    for residue in range(period):
        terms = count if period == 1 else floor((count - residue + period - 1) / Integer(period))
        head = floor((begin + residue * stride) / Integer(span)) - sympify(less)
        skipped = Integer(0) if not clamp else Min(terms, Max(0, ceiling(-head / Integer(slope))))
        total += (terms - skipped) * head + slope * (terms * (terms - 1) - skipped * (skipped - 1)) / 2
    return total
