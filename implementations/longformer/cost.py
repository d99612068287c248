"""Closed forms of Longformer attention. Derivation in README.md."""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Piecewise, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, param
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

BLOCK = Integer(128)  # queries a block of the blocked impl
w, g, step = param("window"), param("num_global"), param("dilation")


def cost(impl: str, mode: str, causal: bool, params: LongformerParams) -> Cost:
    """One impl in one mode; ``as_written`` executes every pair and has one set of projections."""
    form = Form(causal, params)
    visible, executed, tokens, own = form.visible(), form.executed(impl), T, form.own_projections(T)
    if mode == "decode":
        tokens, own = Integer(1), form.own_projections_of_one()
        visible = form.visible_to_one()
        executed = form.kept(T) + 1 if impl == "reference" else visible
    elif mode == "stream":
        executed = form.streamed(impl)
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
    """Pair counts of one direction, all symbolic; T tokens, of which the first ``num_global`` are global."""

    def __init__(self, causal: bool, params: LongformerParams):
        self.causal, self.params = causal, params
        self.separate = params.separate_global and params.num_global > 0
        self.left, self.right = (w - 1, Integer(0)) if causal else (floor(w / 2), floor(w / 2))
        self.globals = Min(g, T)
        self.step = step if params.dilation > 1 else Integer(1)
        self.reach = self.left * self.step

    def kept(self, tokens: Expr) -> Expr:
        """Tokens that a causal layer remembers."""
        return Min(tokens, g + self.reach)

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
        local = g + Min(floor((T - g) / self.step), self.left) + 1
        return Piecewise((T + 1, g > T), (local, True))

    def executed(self, impl: str) -> Expr:
        """Pairs that an impl multiplies for a whole sequence."""
        local = T - self.globals
        if impl == "as_written":
            return T * T
        if impl == "reference":
            return local * T + self.globals * (self.globals if self.causal else T)
        return local * self.globals + self._runs(Integer(0), local) + self._global_rows()

    def streamed(self, impl: str) -> Expr:
        """Pairs over calls of C tokens: the first few fill the state, all later ones are alike."""
        filling = self._calls_until_full()
        total: Expr = Integer(0)
        for call in range(filling):
            total += self._call(impl, call * C, Min(Max(T - call * C, 0), C))
        later = Max(T - filling * C, 0)
        whole = floor(later / C)
        full = g + self.reach
        return total + whole * self._call(impl, full, C) + self._call(impl, full, later - whole * C)

    def _calls_until_full(self) -> int:
        from ctxbench.implementations.longformer import METHOD

        kept = self.params.pattern(self.causal)
        return -(-(kept.num_global + kept.reach) // METHOD.segment_len(self.params))

    def _call(self, impl: str, context: Expr, tokens: Expr) -> Expr:
        before = self.kept(context)
        rows = Min(Max(g - before, 0), tokens)
        local, keys = tokens - rows, before + tokens
        if impl == "reference":
            return local * keys + rows * (before + rows)
        own = Piecewise((triangle(rows), before <= 0), (rows * (before + rows), True))
        return own + local * g + self._runs(before + rows - g, local)

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
        return Piecewise((3 * linear(B, d, d), g > T), (Integer(0), True))

    def state_bytes(self) -> Expr:
        """Keys and values kept, and those of the global rows while the prefix is incomplete."""
        kept = 2 * tensor(B, self.kept(T), d)
        return kept + Piecewise((2 * tensor(B, T, d), g > T), (Integer(0), True)) if self.separate else kept


def _ramp(count: Expr, start: Expr) -> Expr:
    """Sum over b < count of max(0, start + b BLOCK)."""
    skipped = Min(count, Max(0, ceiling(-start / BLOCK)))
    left = count - skipped
    return left * (start + skipped * BLOCK) + BLOCK * left * (left - 1) / 2
