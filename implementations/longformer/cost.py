"""Closed forms of Longformer attention. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, L, T, d, param
from ctxbench.cost.terms import (
    FUSED_BACKWARD,
    attention,
    band_pairs,
    linear,
    linear_parameters,
    projections,
    tensor,
    triangle,
)  # fmt: skip
from ctxbench.implementations._shared.forms import block_ffn, block_parameters
from ctxbench.implementations.longformer.params import LongformerParams
from ctxbench.implementations.longformer.peaks import peak

BLOCK = Integer(64)  # queries a block of the blocked impl
w = param("window")


def cost(impl: str, mode: str, causal: bool, position: str, params: LongformerParams) -> Cost:
    """One impl in one mode; ``as_written`` executes every pair and has one set of projections."""
    form = Form(causal, params)
    visible, executed, tokens, own = form.visible(), form.executed(impl), T, form.own_projections(T)
    if mode == "decode":
        tokens, own = Integer(1), form.own_projections_of_one()
        visible = form.visible_to_one()
        executed = form.kept(T) + 1 if impl == "reference" else visible
    elif mode == "stream":
        executed = Form(causal, params, numbers=True).streamed(impl)
    algorithmic = {"projections": L * projections(tokens), "attention": L * attention(visible)}
    if form.separate:
        algorithmic["global_projections"] = L * own
    algorithmic["ffn"] = block_ffn(tokens)
    flops = {**algorithmic, "attention": L * attention(executed)}
    if impl == "as_written":
        flops.pop("global_projections", None)
    if mode == "train":
        core = FUSED_BACKWARD if impl == "blocked" else 2
        algorithmic = {term: 3 * forward for term, forward in algorithmic.items()}
        flops = {term: forward * (1 + core if term == "attention" else 3) for term, forward in flops.items()}
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters((7 if form.separate else 4) * linear_parameters(d, d)),
        state_bytes=L * form.state_bytes() if causal else Integer(0),
        peak_bytes=peak(impl, mode, causal, params),
    )


class Form:
    """Pair counts of one direction over T tokens; parameters appear by name, or as numbers."""

    def __init__(self, causal: bool, params: LongformerParams, numbers: bool = False):
        self.causal, self.params = causal, params
        self.separate = params.separate_global and params.num_global > 0
        window, self.g = (Integer(params.window), Integer(params.num_global)) if numbers else (w, param("num_global"))
        self.step = param("dilation") if params.dilation > 1 and not numbers else Integer(params.dilation)
        self.left, self.right = (window - 1, Integer(0)) if causal else (floor(window / 2), floor(window / 2))
        self.globals = Min(self.g, T)
        self.reach = self.left * self.step

    def kept(self, tokens: Expr) -> Expr:
        """Tokens that a causal layer remembers."""
        return Min(tokens, self.g + self.reach)

    def visible(self) -> Expr:
        """Pairs that the mathematics needs."""
        local = T - self.globals
        whole = floor(local / self.step)
        more = local - whole * self.step  # residue classes with one token more than the others
        band = (self.step - more) * band_pairs(whole, self.left, self.right)
        if self.params.dilation > 1:
            band += more * band_pairs(whole + 1, self.left, self.right)
        return band + local * self.globals + self._global_rows()

    def _global_rows(self) -> Expr:
        return triangle(self.globals) if self.causal else self.globals * T

    def visible_to_one(self) -> Expr:
        """Pairs of one token after T others."""
        local = self.g + Min(floor((T - self.g) / self.step), self.left) + 1
        return Piecewise((T + 1, self.g > T), (local, True))

    def executed(self, impl: str) -> Expr:
        """Pairs that an impl multiplies for a whole sequence."""
        local = T - self.globals
        if impl == "as_written":
            return T * T
        if impl == "reference":
            return local * T + self.globals * (self.globals if self.causal else T)
        return local * self.globals + self._runs(Integer(0), local) + self._global_rows()

    def streamed(self, impl: str) -> Expr:
        """Pairs over calls of a segment each: the first fill the state, all later whole ones are alike."""
        from ctxbench.implementations.longformer import METHOD

        segment = Integer(METHOD.segment_len(self.params))
        whole, filling = floor(T / segment), int(ceiling((self.g + self.reach) / segment))
        total = self._call(impl, whole * segment, T - whole * segment)  # the last call, if it is shorter
        for call in range(filling):
            total += self._call(impl, call * segment, segment) * Min(1, Max(0, whole - call))
        return total + self._call(impl, filling * segment, segment) * Max(0, whole - filling)

    def _call(self, impl: str, context: Expr, tokens: Expr) -> Expr:
        before = self.kept(context)
        rows = Min(Max(self.g - before, 0), tokens)
        local, keys = tokens - rows, before + tokens
        if impl == "reference":
            return local * keys + rows * (before + rows)
        own = Piecewise((triangle(rows), before <= 0), (rows * (before + rows), True))
        return own + local * self.g + self._runs(before + rows - self.g, local)

    def _runs(self, first: Expr, queries: Expr) -> Expr:
        """Pairs of blocks against their runs; ``first`` non-global keys come before the queries."""
        total: Expr = Integer(0)
        for residue in range(self.params.dilation):
            before = floor((first + residue) / self.step)
            total += self._class_runs(before, ceiling(Max(queries - residue, 0) / self.step))
        return total

    def _class_runs(self, before: Expr, queries: Expr) -> Expr:
        whole = floor(queries / BLOCK)
        rest = queries - whole * BLOCK
        total = before + queries
        if self.causal:
            ends = BLOCK * (whole * before + BLOCK * triangle(whole))
        else:
            ends = BLOCK * (whole * total - _ramp(whole, rest - self.right))
        starts = BLOCK * _ramp(whole, before - self.left) + rest * Max(0, before + whole * BLOCK - self.left)
        return ends + rest * total - starts

    def own_projections(self, tokens: Expr) -> Expr:
        """FLOPs of the global query, key and value projections."""
        keys = self.globals if self.causal else tokens
        return linear(B * self.globals, d, d) + 2 * linear(B * keys, d, d)

    def own_projections_of_one(self) -> Expr:
        """The same for one token after T others."""
        return Piecewise((3 * linear(B, d, d), self.g > T), (Integer(0), True))

    def state_bytes(self) -> Expr:
        """Keys and values kept, and those of the global rows while the prefix is incomplete."""
        kept = 2 * tensor(B, self.kept(T), d)
        return kept + Piecewise((2 * tensor(B, T, d), self.g > T), (Integer(0), True)) if self.separate else kept


def _ramp(count: Expr, start: Expr) -> Expr:
    """Sum over b < count of max(0, start + b BLOCK)."""
    skipped = Min(count, Max(0, ceiling(-start / BLOCK)))
    left = count - skipped
    return left * (start + skipped * BLOCK) + BLOCK * left * (left - 1) / 2
