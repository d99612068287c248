"""Closed forms of Longformer attention. Derivation in README.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from sympy import And, Eq, Expr, Integer, Max, Min, Mod, Or, Piecewise, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, h, param
from ctxbench.cost.terms import (
    band_pairs,
    linear,
    linear_parameters,
    tensor,
    triangle,
)  # fmt: skip
from ctxbench.implementations._shared import flex_forms
from ctxbench.implementations._shared.forms import (
    block_parameters,
    block_terms,
    kernels,
    position_parameters,
    slab_pairs,
    trained,
)
from ctxbench.implementations._shared.window_pairs import run_pairs
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.implementations.longformer.peaks import peak
from ctxbench.method import ROPE

w = param("window")


def cost(impl: str, mode: str, causal: bool, position: str, params: LongformerParams) -> Cost:
    """One impl in one mode; ``as_written`` executes every pair and has one set of projections."""
    turns = impl == "triton" and position in ROPE  # its kernels rotate queries as they read them
    impl, form = kernels(impl), Form(causal, params)
    tokens, own = T, form.own_projections(T)
    visible, executed = over_heads(Form.visible, causal, params), over_heads(lambda f: f.executed(impl), causal, params)
    if mode == "decode":
        tokens, own = Integer(1), form.own_projections_of_one()
        visible = over_heads(Form.visible_to_one, causal, params)
        executed = over_heads(lambda f: f.executed_for_one(impl), causal, params)
    elif mode == "stream":
        executed = over_heads(lambda f: f.streamed(impl), causal, params, numbers=True)
    algorithmic, flops = block_terms(tokens, visible), block_terms(tokens, executed)
    if form.separate:
        algorithmic["global_projections"] = L * own
        if impl != "as_written":
            flops["global_projections"] = L * own
    if mode == "train":
        algorithmic, flops = trained(algorithmic), trained(flops, impl, position)
    kept = 2 * tensor(B, over_heads(lambda f: f.kept(T), causal, params), d)
    rotates = position in ROPE
    rotated = rotates and not params.positions and mode != "stream"
    known = (position == "none" or rotated) and not dilates_some(params) and impl != "flex"
    if impl == "triton":
        known = known and params.dilation == 1 and not params.positions
    elif params.positions:
        known = known and (mode == "forward" or (mode == "train" and impl == "blocked"))
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters((7 if form.separate else 4) * linear_parameters(d, d))
        + position_parameters(position),
        state_bytes=L * (kept + form.beside_the_band()) if causal else Integer(0),
        peak_bytes=peak(impl, mode, causal, params, rotates, turns) if known else None,
        depth=L,
    )


def dilates_some(params: LongformerParams) -> bool:
    """Whether heads differ."""
    return params.dilation > 1 and params.dilated_heads > 0


def over_heads(count: Callable[[Form], Expr], causal: bool, params: LongformerParams, numbers: bool = False) -> Expr:
    """The mean over heads of a count."""
    dilated = count(Form(causal, params, numbers))
    if not dilates_some(params):
        return dilated
    share = param("dilated_heads") / h
    return share * dilated + (1 - share) * count(Form(causal, dataclasses.replace(params, dilation=1), numbers))


class Form:
    """Pair counts of one head in one direction over T tokens; parameters appear by name, or as numbers.

    ``scattered`` positions are numbers always.
    """

    def __init__(self, causal: bool, params: LongformerParams, numbers: bool = False):
        self.causal, self.params = causal, params
        self.scattered = params.positions
        self.separate = params.separate_global and (params.num_global > 0 or bool(self.scattered))
        window, self.g = (Integer(params.window), Integer(params.num_global)) if numbers else (w, param("num_global"))
        self.step = param("dilation") if params.dilation > 1 and not numbers else Integer(params.dilation)
        self.left, self.right = (window - 1, Integer(0)) if causal else (floor(window / 2), floor(window / 2))
        self.globals = Min(self.g, T)
        self.reach = self.left * self.step
        self.end = Integer(self.scattered[-1] + 1) if self.scattered else self.g  # of the globals

    def met(self, tokens: Expr) -> Expr:
        """Scattered globals among the first ``tokens`` tokens."""
        return sum((_holds(tokens > position) for position in self.scattered), Integer(0))

    def kept(self, tokens: Expr) -> Expr:
        """Tokens that the band of a causal layer remembers, after ``tokens`` tokens."""
        kept = Min(tokens, self.g + self.reach)
        return kept if self.separate or not self.scattered else Piecewise((tokens, tokens < self.end), (kept, True))

    def visible(self) -> Expr:
        """Pairs that the mathematics needs."""
        band = T - self.globals
        pairs = self._band(band)
        rows = triangle(self.globals) if self.causal else self.globals * T
        met = self.met(T)
        for order, place in enumerate(self.scattered):
            index = place - self.g  # in the band, which it leaves
            before, after = floor(index / self.step), floor((T - 1 - place) / self.step)
            row = 1 + Min(before, self.left) + Min(after, self.right)
            column = 1 + Min(after, self.left) + Min(before, self.right)
            near = self._near(place, order)
            seen_by = T - 1 - place - (met - 1 - order) if self.causal else band - met
            own = place + 1 if self.causal else T
            pairs += _holds(place < T) * (own + seen_by - row - column + near)
        return pairs + (band - met) * self.globals + rows

    def _band(self, band: Expr) -> Expr:
        """Pairs of a band over so many tokens, scattered globals like all others."""
        whole = floor(band / self.step)
        more = band - whole * self.step  # residue classes with one token more than the others
        pairs = (self.step - more) * band_pairs(whole, self.left, self.right)
        if self.params.dilation > 1:
            pairs += more * band_pairs(whole + 1, self.left, self.right)
        return pairs

    def _band_from(self, first: Expr, queries: Expr) -> Expr:
        """The same in a causal layer for the last ``queries`` of its tokens, which have ``first`` before them."""
        return self._band(first + queries) - self._band(first)

    def _seen_scattered(self, context: Expr, end: Expr) -> Expr:
        """Pairs that the range of scattered globals adds: all queries of a call with all met."""
        return self.met(end) * (end - context - Min(Max(self.g - context, 0), end - context))

    def _near(self, place: int, order: int) -> int:
        """Pairs of the band between a scattered global and those up to it."""
        steps = [divmod(place - other, self.params.dilation) for other in self.scattered[:order]]
        reach = self.params.window - 1 if self.causal else self.params.window // 2
        near = sum(not rest and distance <= reach for distance, rest in steps)
        return 1 + (near if self.causal else 2 * near)

    def visible_to_one(self) -> Expr:
        """Pairs of one token after T others."""
        local = self.g + Min(floor((T - self.g) / self.step), self.left) + 1
        for place in self.scattered:  # seen where it is beyond the band
            local += _holds(And(place < T, (T - place > self.reach) | ~Eq(Mod(T - place, self.step), 0)))
        return Piecewise((T + 1, self._is_global(T)), (local, True))

    def _is_global(self, place: Expr) -> Expr:
        return (self.g > place) | _any(Eq(place, position) for position in self.scattered)

    def executed(self, impl: str) -> Expr:
        """Pairs that an impl multiplies for a whole sequence."""
        if impl == "as_written":
            return T * T
        if impl == "flex":
            own = slab_pairs(self.globals) if self.causal else self.globals * T
            return own + flex_forms.band_pairs(self.globals, T - self.globals, self.left, self.right)
        if self.causal:
            return self._call(impl, Integer(0), T)
        local, met = T - self.globals, self.met(T)
        rows = (self.globals + met) * T
        if impl == "triton":
            return local * (self.globals + met) + self._band(local) + rows
        if impl == "reference":
            return local * (met + T) + rows
        return local * (self.globals + met) + self._runs(Integer(0), local) + rows

    def executed_for_one(self, impl: str) -> Expr:
        """Pairs that an impl multiplies for one token after T others."""
        if self.scattered or impl == "triton":
            return self._call(impl, T, Integer(1))
        return self.kept(T) + 1 if impl == "reference" else self.visible_to_one()

    def streamed(self, impl: str) -> Expr:
        """Pairs over calls of a segment each: the first fill the state, all later whole ones are alike."""
        from ctxbench.implementations.longformer import METHOD

        segment = Integer(METHOD.segment_len(self.params))
        filling = int(ceiling(Max(self.g + self.reach, self.end) / segment))
        whole = floor(T / segment)
        total = self._call(impl, whole * segment, T - whole * segment)  # the last call, if it is shorter
        for call in range(filling):
            total += self._call(impl, call * segment, segment) * Min(1, Max(0, whole - call))
        return total + self._call(impl, filling * segment, segment) * Max(0, whole - filling)

    def _call(self, impl: str, context: Expr, tokens: Expr) -> Expr:
        """Pairs of one call of a causal layer."""
        before, end = self.kept(context), context + tokens
        prefix, met = Min(Max(self.g - context, 0), tokens), self.met(end)
        local, keys = tokens - prefix, before + tokens
        if impl == "triton":  # what is visible, and in the band also scattered globals
            own = prefix * context + triangle(prefix)
            own += sum(
                ((place + 1) * _holds((end > place) & (context <= place)) for place in self.scattered), Integer(0)
            )
            first = before + prefix - Min(self.g, before + tokens)
            return own + local * Min(self.g, end) + self._seen_scattered(context, end) + self._band_from(first, local)
        if self.scattered:
            own = (prefix + met - self.met(context)) * Min(end, self.end)
        elif impl == "reference":
            own = prefix * (before + prefix)
        else:
            own = Piecewise((triangle(prefix), before <= 0), (prefix * (before + prefix), True))
        if impl == "reference":
            return local * (met + keys) + own
        return own + local * (self.g + met) + self._runs(before + prefix - self.g, local)

    def _runs(self, first: Expr, queries: Expr) -> Expr:
        return run_pairs(first, queries, self.left, self.right, self.params.dilation, self.step)

    def own_projections(self, tokens: Expr) -> Expr:
        """FLOPs of the global query, key and value projections."""
        keys = Min(tokens, self.end) if self.causal else tokens
        return linear(B * (self.globals + self.met(tokens)), d, d) + 2 * linear(B * keys, d, d)

    def own_projections_of_one(self) -> Expr:
        """The same for one token after T others."""
        query, pair = linear(B, d, d) * _holds(self._is_global(T)), 2 * linear(B, d, d) * _holds(self.end > T)
        return query + pair

    def beside_the_band(self) -> Expr:
        """Bytes of scattered globals, and of all tokens in the global projections while a global row is to come."""
        kept = 2 * tensor(B, self.met(T), d)
        return kept + 2 * tensor(B, T, d) * _holds(self.end > T) if self.separate else kept


def _holds(condition: Expr) -> Expr:
    """1 where it holds, else 0."""
    return Piecewise((Integer(1), condition), (Integer(0), True))


def _any(conditions: Iterable[Expr]) -> Expr:
    return Or(*conditions)
