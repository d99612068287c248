"""Closed forms of the allocator peak: what is alive together at the worst moment of each mode.

A row is one ``[B, T, d]`` tensor. Forward and streaming compare the mixer with the feed-forward network; training
compares the top layer's two halves in the backward pass, when everything below it is still saved.
"""

from __future__ import annotations

from sympy import Add, Expr, Integer, Max, Min, Piecewise, ceiling, floor

from ctxbench.cost.symbols import B, C, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.forms import rotated, rotation_tables, stack_peak
from ctxbench.implementations.longformer.params import LongformerParams

BLOCK, SPAN = 64, 1024  # queries whose scores are alive together, queries copied together
w, g, step = param("window"), param("num_global"), param("dilation")


def peak(
    impl: str, mode: str, causal: bool, params: LongformerParams, rotates: bool = False, turns: bool = False
) -> Expr:
    """Bytes above parameters, inputs and incoming state. ``turns``: attention rotates its queries by itself."""
    sizes = Kernels(impl, causal, params, turns) if impl == "triton" else Sizes(impl, causal, params)
    if turns and mode in ("forward", "train"):
        return sizes.forward() if mode == "forward" else sizes.train()
    if mode == "forward":
        return rotated(sizes.forward(), mode, sizes.beside) if rotates else sizes.forward()
    if mode == "train":
        return rotated(sizes.train(), mode) + L * rotation_tables(sizes.turned) if rotates else sizes.train()
    return sizes.stream() if mode == "stream" else sizes.decode()  # one token: memory decides


class Sizes:
    """Bytes of what one impl keeps, in one direction."""

    def __init__(self, impl: str, causal: bool, params: LongformerParams):
        self.impl, self.causal = impl, causal
        self.left, self.right = (w - 1, Integer(0)) if causal else (floor(w / 2), floor(w / 2))
        self.step = step if params.dilation > 1 else Integer(1)
        self.local = T - Min(g, T)
        self.row = tensor(B, T, d)
        self.scattered = Add(*(Min(1, Max(0, T - position)) for position in params.positions))  # those there are
        self.copied = self.row if params.positions else Integer(0)  # of the gradient, without the rows of those
        self.sliced: Expr = Integer(0)
        self.turned: Expr = Integer(0)  # global rows, and keys for them, that are rotated apart
        self.beside: Expr = Integer(0)  # what is alive besides, where these are all keys
        self.own: Expr = Integer(0)  # global rows: queries and outputs, and the keys and values they see
        if params.separate_global and (params.num_global > 0 or params.positions) and impl != "as_written":
            end = Integer(params.positions[-1] + 1) if params.positions else g
            seen = tensor(B, Min(end, T), d) if causal else self.row
            self.turned = Min(g, T) + self.scattered + (Min(end, T) if causal else T)
            self.own = 2 * tensor(B, Min(g, T) + self.scattered, d) + 2 * seen
            self.beside = Integer(0) if causal else self.row + tensor(B, Min(g, T) + self.scattered, d)
            if causal and params.positions:  # what a linear map saves of a part of several sequences is a copy
                self.sliced = 2 * Min(B - 1, 1) * Min(1, Max(0, T - end)) * seen

    def forward(self) -> Expr:
        """Norm, queries, keys, values; then scores twice with their masks, or the output and the buffers."""
        if self.impl == "blocked":
            return stack_peak(T, 5 * self.row + self.own + self._buffers(self.local, self.local))
        return stack_peak(T, 4 * self.row + self.own + self._scores(self.local, T + self.scattered))

    def _scores(self, queries: Expr, keys: Expr) -> Expr:
        """Scores twice, masked or as probabilities; their mask, then its inverse or the output."""
        if self.impl == "as_written":  # float mask, and its inverse
            return 2 * tensor(B, h, keys, keys) + 5 * keys * keys
        return 2 * tensor(B, h, queries, keys) + queries * keys + largest(queries * keys, tensor(B, queries, d))

    def _buffers(self, queries: Expr, keys: Expr) -> Expr:
        """The blocked impl's copies of queries, keys and values, one block's scores, and what hides two corners."""
        rows, _, _, scores = self._shape(queries, keys)
        packed = Piecewise((tensor(B, scores, d), e < 4), (Integer(0), True))  # a block's keys in one piece
        return self._copies(queries, keys, 1, 2) + tensor(B, h, rows, scores) + packed + 2 * e * rows * rows

    def _copies(self, queries: Expr, keys: Expr, of_queries: Expr | int, of_keys: Expr | int) -> Expr:
        _, span, columns, _ = self._shape(queries, keys)
        return of_queries * tensor(B, span, d) + of_keys * tensor(B, columns, d)

    def _shape(self, queries: Expr, keys: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """Queries a block and a span; columns (prefix and run) of a span and of a block."""
        mine, all_keys = ceiling(queries / self.step), ceiling(keys / self.step)
        rows, span = Min(BLOCK, mine), Min(SPAN, mine)
        width = g + self.scattered
        columns = width + Min(all_keys, self.left + span + self.right)
        return rows, span, columns, width + Min(all_keys, self.left + rows + self.right)

    def train(self) -> Expr:
        """The top layer's feed-forward backward with everything saved, or its mixer's."""
        saved, weights = self._saved(), tensor(d, f)
        feed = when_ffn(L * saved + tensor(B, T, f) + weights)
        return largest(feed, (L - 1) * saved + self._mixer_backward() + when_ffn(self.row + 2 * weights))

    def _saved(self) -> Expr:
        """A layer's activations: norm, q, k, v, mixed, the residuals; with an FFN its norm and hidden tensors."""
        plain = 6 * self.row + self.own + self.sliced + 2 * e * B * T
        if self.impl != "blocked":
            plain += self._probabilities()
        return plain + when_ffn(2 * self.row + 2 * tensor(B, T, f) + 2 * e * B * T)

    def _probabilities(self) -> Expr:
        if self.impl == "as_written":
            return tensor(B, h, T, T) + T * T
        own = tensor(B, h, Min(g, T), Min(g, T) if self.causal else T)
        return tensor(B, h, self.local, T) + self.local * T + own

    def _mixer_backward(self) -> Expr:
        if self.impl != "blocked":  # norm, q, k or v, one gradient of those, output; P, dP, dS
            queries = T if self.impl == "as_written" else self.local
            gradient = 2 * tensor(B, h, queries, T)
            return 5 * self.row + self.own + self._probabilities() + gradient + tensor(d, d)
        # norm, q, k, v, their gradients, that of the mixed rows, output; sums of key gradients in fp32 or wider
        rows, _, columns, scores = self._shape(self.local, self.local)
        wide = 2 * largest(e, 4) * B * (columns + g) * d
        buffers = self._buffers(self.local, self.local) + self._copies(self.local, self.local, 1, 1)
        buffers += tensor(B, h, rows, scores) + wide
        return 9 * self.row + self.own + self.sliced + self.copied + buffers + tensor(d, d)

    def _kept(self, tokens: Expr) -> Expr:
        """Bytes of one layer's state."""
        return 2 * tensor(B, Min(tokens, g + self.left * self.step), d)

    def stream(self) -> Expr:
        """The last call, or the last whole one."""
        whole = floor(T / C) * C
        rest = T - whole
        return largest(self._call(whole - C, C), Piecewise((self._call(whole, rest), rest > 0), (Integer(0), True)))

    def _call(self, before: Expr, tokens: Expr) -> Expr:
        """All layers' old states, the new ones of the layers below, and the top layer's own tensors."""
        old, new, row = self._kept(before), self._kept(before + tokens), tensor(B, tokens, d)
        keys = Min(before, g + self.left * self.step) + tokens
        local = Min(tokens, largest(before + tokens - g, 0))
        mixing = L * old + (L - 1) * new + 2 * tensor(B, keys, d) + 2 * row  # joined keys and values, norm, q
        mixing += row + self._buffers(local, keys - g) if self.impl == "blocked" else self._scores(local, keys)
        feed = when_ffn(L * (old + new) + 2 * row + 2 * tensor(B, tokens, f))
        return (
            largest(mixing, feed) + Min(L - 1, 1) * row + tensor(B, Min(before, C), d)
        )  # the output of the call before

    def decode(self) -> Expr:
        """The last layer: joined keys and values, then their copies or the new state."""
        most = g + self.left * self.step
        new, keys = self._kept(T + 1), Min(T, most) + 1
        joined = 2 * tensor(B, keys, d)
        inside = joined + self._buffers(Integer(1), keys - g) if self.impl == "blocked" else joined
        after = joined + Piecewise((new, most <= T), (Integer(0), True))  # else what is joined is the new state
        feed = when_ffn(new + 2 * tensor(B, 1, f) + 3 * tensor(B, 1, d))
        return (L - 1) * new + largest(largest(inside, after) + 3 * tensor(B, 1, d), feed)


class Kernels(Sizes):
    """Bytes of what the Triton impl keeps, without scattered globals and dilation: exactly the traced ones."""

    def __init__(self, impl: str, causal: bool, params: LongformerParams, turns: bool = False):
        super().__init__(impl, causal, params)
        self.turns, self.some = int(turns), int(params.num_global > 0)  # whether there are global rows
        self.apart = self.some * int(params.separate_global)  # whether they have projections of their own
        self.tables = self.turns * rotation_tables(T + self.apart * Min(g, T))  # with which queries wait to be turned
        self.head, self.rest = tensor(B, Min(g, T), d), tensor(B, self.local, d)
        seen = self.head if causal else self.row
        self.of_head = 2 * seen * self.some  # gradients of the keys and values that global rows see
        self.own = (self.head + 2 * seen) * self.apart
        # What a linear map saves of a part of several sequences is a copy: x for global queries, keys and values.
        self.sliced = Min(B - 1, 1) * self.head * self.apart * (3 if causal else 1)

    def forward(self) -> Expr:
        """Norm, queries, keys, values; global rows, the others and both together, or all rows with log-sum-exps."""
        mixing = 6 * self.row + self.own if self.some else 5 * self.row + 4 * B * h * T
        return stack_peak(T, mixing + self.tables)

    def train(self) -> Expr:
        """The top layer's backward pass, in its feed-forward network or in the attention of what is not global."""
        statistics, hidden = 2 * e * B * T, tensor(B, T, f)
        kept = 4 * B * h * T + (6 + self.some) * self.row + self.own + self.sliced + statistics
        kept += when_ffn(2 * self.row + 2 * hidden + statistics)
        kept += self.turns * (rotation_tables(T + self.turned) - self.apart * self.head)  # turned: the others alone
        in_ffn = when_ffn(kept + hidden + e * (d * f + d))
        # Norm, q, k, v, output and its gradient; of the others results and gradients of q, k, v; of the prefix those of
        # global queries, and of keys and values from either side.
        attending = 6 * self.row + 4 * self.rest + 4 * B * h * self.local + self.sliced
        attending += self.some * 3 * self.head + self.of_head if self.some else Integer(0)
        # Turned queries and their tables go with the launch that read them: global rows' go first.
        attending += self.turns * (rotation_tables(T + self.turned - self.apart * Min(g, T)) - self.some * self.head)
        weights = e * (d * d + d) + when_ffn(self.row + e * (2 * d * f + f + 3 * d))
        return (L - 1) * kept + largest(in_ffn, attending + statistics + weights)

    def stream(self) -> Expr:
        """The first call, which has the global rows, the last whole one, or the last."""
        whole = floor(T / C) * C
        calls = [self._call(before, tokens) for before, tokens in ((0, Min(C, T)), (whole - C, C), (whole, T - whole))]
        there = (1, Min(1, floor(T / C)), Min(1, T - whole))
        return largest(*(some * call for some, call in zip(there, calls, strict=True)))

    def _call(self, before: Expr | int, tokens: Expr) -> Expr:
        """Norm and q beside joined keys and values; k and v, or the result with log-sum-exps or with the new state."""
        before = Integer(before) if isinstance(before, int) else before
        old, new, row = self._kept(before), self._kept(before + tokens), tensor(B, tokens, d)
        joined = old + 2 * row
        inside = 3 * row + largest(row, 4 * B * h * tokens, self._cut(before + tokens))
        if before == 0 and self.some:
            inside = largest(inside, 4 * row + self.own)
        mixing = L * old + (L - 1) * new + joined + inside
        feed = when_ffn(L * (old + new) + 2 * row + 2 * tensor(B, tokens, f))
        return largest(mixing, feed) + Min(L - 1, 1) * row + tensor(B, Min(before, C), d)

    def _cut(self, tokens: Expr) -> Expr:
        """The state after so many tokens, unless it is the joined keys and values as they are."""
        return Piecewise((self._kept(tokens), tokens > g + self.left), (Integer(0), True))

    def decode(self) -> Expr:
        """The last layer: joined keys and values, and the new state unless they are it."""
        one, new = tensor(B, 1, d), self._kept(T + 1)
        # Where queries turn, their tables, and the turned one beside log-sum-exps.
        inside = 2 * tensor(B, Min(T, g + self.left) + 1, d) + 3 * one + self.turns * rotation_tables(1)
        inside += largest(one + self.turns * 4 * B * h, self._cut(T + 1))
        feed = when_ffn(new + 2 * tensor(B, 1, f) + 2 * one)
        return (L - 1) * new + largest(inside, feed) + Min(L - 1, 1) * one
