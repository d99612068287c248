"""Closed forms of the allocator peak: what is alive together at the worst moment of each mode.

A row is one ``[B, T, d]`` tensor. Forward and streaming compare the mixer with the feed-forward network; training
compares the top layer's two halves in the backward pass, when everything below it is still saved.
"""

from __future__ import annotations

from sympy import Add, Expr, Integer, Max, Min, Mod, Piecewise, ceiling, floor

from ctxbench.cost.symbols import B, C, L, T, d, e, f, h
from ctxbench.cost.terms import tensor, when_ffn
from ctxbench.implementations._shared.forms import rotation_tables, stack_peak
from ctxbench.implementations.hierarchical.params import HierarchicalParams, Scale, slab_rows
from ctxbench.implementations.hierarchical.sizes import keeps, most


def peak(impl: str, mode: str, params: HierarchicalParams, rotates: bool = False) -> Expr:
    """Bytes above parameters, inputs and incoming state; ``rotates``: of forward and training in the causal forms."""
    if impl == "as_written" or params.form == "seed":
        branches = Branches(impl, params)
        return branches.train() if mode == "train" else branches.forward()
    slabs = Kernels(impl, params) if impl == "triton" else Slabs(impl, params)
    if rotates:
        return Max(slabs.forward(), slabs.rotating()) if mode == "forward" else slabs.train() + slabs.tables()
    return {"forward": slabs.forward, "train": slabs.train, "stream": slabs.stream, "decode": slabs.decode}[mode]()


def _feed_forward_backward(saved: Expr, layers: Expr) -> Expr:
    """All layers' activations, the gradient of the hidden ones and of the outer matrix."""
    return when_ffn(layers * saved + tensor(B, T, f) + tensor(d, f))


def _feed_forward_gradients() -> Expr:
    """What is left of the feed-forward network once the mixer's turn has come."""
    return when_ffn(tensor(B, T, d) + 2 * tensor(d, f))


def _saved_by_feed_forward() -> Expr:
    """Norm and its statistics, both hidden tensors, and the sum with the residual."""
    return when_ffn(2 * tensor(B, T, d) + 2 * tensor(B, T, f) + 2 * e * B * T)


class Slabs:
    """The causal forms: tokens and cells of all scales, keys and values, in one softmax."""

    def __init__(self, impl: str, params: HierarchicalParams):
        self.blocked, self.scales = impl == "blocked", params.scales
        self.step = slab_rows(self.scales)
        self.row = tensor(B, T, d)

    def forward(self) -> Expr:
        """Norm, queries, keys, values: twice while they are put together; then with the cells and the scores."""
        mixing = 4 * self.row + self._cells(T)
        if self.blocked:
            mixing += self.row + self._slab(T, T)
        else:
            mixing += self._pairs(T) + self._scores(T, self._columns(T))
        return stack_peak(T, Max(6 * self.row, mixing))

    def rotating(self) -> Expr:
        """Norm, q, and the pairs as projected; those placed so far; a scale's means, and products or new pairs."""
        moments: list[Expr] = []
        placed: Expr = Integer(0)
        for number, scale in enumerate(self.scales):
            cells = tensor(B, floor(T / scale.span), d)
            turned = 2 * cells / e * Max(e, 4) + rotation_tables(floor(T / scale.span))
            moments.append(placed + (2 * cells if number else 0) + Max(turned, 3 * cells))
            placed += 2 * cells
        return stack_peak(T, 4 * self.row + Max(*moments))

    def tables(self) -> Expr:
        """Cosines and sines that training keeps: of queries and of every scale's keys."""
        return L * Add(rotation_tables(T), *(rotation_tables(floor(T / scale.span)) for scale in self.scales))

    def train(self) -> Expr:
        """A layer keeps norm, q, the pairs, what was found, the residual; ``reference`` its probabilities too."""
        saved = 6 * self.row + self._cells(T) + 2 * e * B * T + _saved_by_feed_forward()
        inside = tensor(d, d) + _feed_forward_gradients()
        if self.blocked:  # norm, q, pairs, output, gradient of what was found; gradients of q and of the pairs
            inside += 6 * self.row + self._cells(T) + self._slab(T, T) + self._scores_of_slab(T, T)
            inside += tensor(B, T, d) + Max(e, 4) * 2 * B * self._columns(T) * d + 2 * tensor(B, self.step, d)
        else:  # norm, q, pairs, output; gradient of values; probabilities, their gradient and that of the scores
            columns = self._columns(T)
            saved += tensor(B, h, T, columns) + T * columns
            inside += 3 * self.row + self._pairs(T) + self._pairs(T) / 2 + 3 * tensor(B, h, T, columns) + T * columns
        return Max(_feed_forward_backward(saved, L), (L - 1) * saved + inside)

    def stream(self) -> Expr:
        """The last whole call or the shorter one after it."""
        whole = floor(T / C) * C
        return Max(self._call(C, whole), Piecewise((self._call(T - whole, T), whole < T), (0, True)))

    def _call(self, tokens: Expr, seen: Expr) -> Expr:
        """All layers' states before the call, those after it of the layers below, and the call before's output."""
        before, row = seen - tokens, tensor(B, tokens, d)
        old, new = self._state(before), self._state(seen)
        keys = Add(*(self._joined(scale, before, seen) for scale in self.scales))
        mixing = 2 * row + 2 * tensor(B, keys, d)
        if self.blocked:
            mixing += row + self._slab(tokens, seen)
        else:
            mixing += 2 * tensor(B, keys, d) + self._scores(tokens, keys)
        feed = when_ffn(new + 2 * row + 2 * tensor(B, tokens, f))
        outside = L * old + (L - 1) * new + tensor(B, C, d) + Min(L - 1, 1) * row
        return outside + Max(mixing, feed)

    def decode(self) -> Expr:
        """The last layer: its keys and values with the token, then the scores, or the state that is cut from them."""
        joined, cut, keys = Integer(0), Integer(0), Integer(0)
        lower: Expr = Integer(0)
        for scale in self.scales:
            count, kept = self._joined(scale, T, T + 1), keeps(scale, T + 1)
            fresh = Min(1, floor((T + 1) / scale.span) - floor(T / scale.span))  # else the old tensor is handed on
            surplus = Min(1, count - kept)
            keys += count
            joined += fresh * count
            cut += fresh * surplus * kept
            lower += fresh * kept
        row = tensor(B, 1, d)
        found = tensor(B, h, 1, keys) if self.blocked else 2 * tensor(B, keys, d) + 2 * tensor(B, h, 1, keys) + 8 * keys
        feed = when_ffn(2 * tensor(B, lower, d) + 2 * row + 2 * tensor(B, 1, f))
        own = 2 * tensor(B, joined, d) + Max(found, 2 * tensor(B, cut, d)) + (3 + 2 * (len(self.scales) - 1)) * row
        return 2 * (L - 1) * tensor(B, lower, d) + Max(own, feed)

    def _cells(self, tokens: Expr) -> Expr:
        """Keys and values of all coarse cells."""
        return 2 * tensor(B, self._columns(tokens) - tokens, d)

    def _columns(self, tokens: Expr) -> Expr:
        """Tokens and cells of all scales."""
        return Add(*(floor(tokens / scale.span) for scale in self.scales))

    def _pairs(self, tokens: Expr) -> Expr:
        """Keys and values of all scales in one tensor."""
        return 2 * tensor(B, self._columns(tokens), d)

    def _state(self, tokens: Expr) -> Expr:
        cells = Add(*(keeps(scale, tokens) for scale in self.scales)) + len(self.scales) - 1
        return 2 * tensor(B, cells, d)

    def _joined(self, scale: Scale, before: Expr, after: Expr) -> Expr:
        """Cells at hand in a call: the remembered ones and those it completes."""
        return keeps(scale, before) + floor(after / scale.span) - floor(before / scale.span)

    def _scores(self, queries: Expr, keys: Expr) -> Expr:
        """Scores before and after masking; the masks of the scales and their inverse."""
        return 2 * tensor(B, h, queries, keys) + 2 * queries * keys

    def _scores_of_slab(self, queries: Expr, seen: Expr) -> Expr:
        """Scores of the last slab, which sees the most."""
        rows = Min(self.step, queries)
        width: Expr = Integer(0)
        for scale in self.scales:
            complete = floor(seen / scale.span)
            if scale.most is None:
                width += complete
            else:
                width += complete - Max(0, floor((seen - rows + 1) / scale.span) - most(scale))
        return tensor(B, h, rows, width)

    def _slab(self, queries: Expr, seen: Expr) -> Expr:
        """The blocked impl's scores, three copies of a slab's queries, and the masks of its corners."""
        rows = Min(self.step, queries)
        corners = Add(*(rows / scale.span for scale in self.scales))
        return self._scores_of_slab(queries, seen) + 3 * tensor(B, rows, d) + 2 * rows * floor(corners)


class Kernels(Slabs):
    """The causal forms by the Triton impl, which has results and log-sum-exps of all scales that have a cell."""

    def forward(self) -> Expr:
        """Norm, queries, keys and values, with the cells and the merge."""
        return stack_peak(T, 4 * self.row + self._cells(T) + self._merge(T, self._there(T)))

    def train(self) -> Expr:
        """A layer keeps norm, q, the pairs, what scales found and what came of it, the residual; see ``_merge``."""
        there, numbers, statistics = self._there(T), 4 * B * h * T, 2 * e * B * T
        found = self._several(there, there * self.row + 2 * there * numbers, numbers)
        saved = 6 * self.row + self._cells(T) + found + statistics + _saved_by_feed_forward()
        # Norm, q, pairs, what scales found with their shares, output; gradients of the merged, of what all scales but
        # one found and of the shares, and two products.
        wide = 3 * tensor(B, T, d) / e * Max(e, 4)
        last = Piecewise((numbers, e >= 4), (self.row, True))
        merge = found + (there - 1) * self.row + there * numbers + wide + last
        inside = 5 * self.row + self._cells(T) + self._several(there, merge, numbers + 5 * self.row)
        gradients = e * (d * d + d) + when_ffn(self.row + e * (2 * d * f + f + 3 * d))
        in_ffn = when_ffn(L * saved + tensor(B, T, f) + e * (d * f + d))
        return Max(in_ffn, (L - 1) * saved + inside + statistics + gradients)

    def _call(self, tokens: Expr, seen: Expr) -> Expr:
        before, row = seen - tokens, tensor(B, tokens, d)
        old, new = self._state(before), self._state(seen)
        at_hand = [self._joined(scale, before, seen) for scale in self.scales]
        there = Add(*(Min(1, count) for count in at_hand))
        cut = [
            Min(1, count - keeps(scale, seen)) * keeps(scale, seen)
            for scale, count in zip(self.scales, at_hand, strict=True)
        ]
        inside = Max(self._merge(tokens, there), row + 2 * tensor(B, Add(*cut), d))  # found, and the state cut out
        mixing = 2 * row + 2 * tensor(B, Add(*at_hand) + len(self.scales) - 1, d) + inside
        joining = 4 * row + 2 * tensor(B, at_hand[0], d)
        feed = when_ffn(new + 2 * row + 2 * tensor(B, tokens, f))
        outside = L * old + (L - 1) * new + tensor(B, Min(before, C), d) + Min(L - 1, 1) * row
        return outside + Max(joining, mixing, feed)

    def _merge(self, tokens: Expr, there: Expr) -> Expr:
        """What scales found, their log-sum-exps, shares, and a product, the sum so far and the next one in float32."""
        numbers, row = 4 * B * h * tokens, tensor(B, tokens, d)
        several = there * row + (2 * there + 1) * numbers + 3 * row / e * Max(e, 4)
        return self._several(there, several, row + 2 * numbers)

    def _there(self, tokens: Expr) -> Expr:
        """Scales that have a cell."""
        return Add(*(Min(1, floor(tokens / scale.span)) for scale in self.scales))

    def _several(self, there: Expr, merged: Expr, alone: Expr) -> Expr:
        return Piecewise((merged, there > 1), (alone, True))


class Branches:
    """The sketch and its repair: one branch a scale, all of which meet in the fusion."""

    def __init__(self, impl: str, params: HierarchicalParams):
        self.impl, self.spans = impl, params.spans
        self.row, self.levels = tensor(B, T, d), params.levels
        counts = [floor(T / span) if impl == "as_written" else ceiling(T / span) for span in self.spans[1:]]
        self.last = tensor(B, counts[-1], d) if counts else Integer(0)
        self.coarse = tensor(B, Add(*counts), d)
        self.squares = [tensor(B, h, count, count) for count in (T, *counts)]

    def forward(self) -> Expr:
        if self.impl == "as_written":  # norm, all branches at full length, their concatenation, the result
            fusion = (2 * self.levels + 2) * self.row + (2 * self.last if self.levels > 1 else 0)
            return stack_peak(T, Max(7 * self.row, fusion))
        if self.impl == "blocked":  # norm, q, k, v and what was found; then all branches, one brought back, three sums
            fusion = (6 if self.levels > 1 else 3) * self.row + self.coarse
            return stack_peak(T, Max(5 * self.row + 4 * B * h * T, fusion))
        # The same with two score tensors, and a copy of v where the batch keeps its heads apart.
        return stack_peak(T, 5 * self.row + Min(B - 1, 1) * self.row + 2 * self.squares[0])

    def train(self) -> Expr:
        matrices = 4 * self.levels + self.levels + sum(self.spans[1:])
        saved, statistics = self._saved(), 2 * e * B * T
        below = saved + statistics + _saved_by_feed_forward()
        fed = _feed_forward_gradients()
        if self.impl == "as_written":  # fusion: the gradient of the concatenation
            inside = saved + self.levels * self.row + self.levels * tensor(d, d)
        elif self.impl == "blocked":  # fusion: gradients of what was brought back
            ragged = Min(1, Mod(T, self.spans[-1])) * self.row
            inside = saved + (2 * self.row + ragged if self.levels > 1 else self.row) + self.levels * tensor(d, d)
            # branch of single tokens: norm, q, k, v, what was found, output; gradients of these and of the norm
            branch = 11 * self.row + 4 * B * h * T + matrices * tensor(d, d)
            inside = Max(inside, branch)
        else:  # branch of single tokens: norm, q, k, output; gradients of v and of the norm; three score tensors
            inside = 6 * self.row + 3 * self.squares[0] + matrices * tensor(d, d)
        return Max(_feed_forward_backward(below, L), (L - 1) * below + inside + fed)

    def _saved(self) -> Expr:
        """Norm, branches, what the fusion reads, the residual."""
        if self.impl == "as_written":  # q twice, k, v and what was found; pooled cells and those to be brought back
            return (7 + self.levels) * self.row + 7 * self.coarse
        branches = 4 * self.row + 6 * self.coarse
        if self.impl == "blocked":  # with kernels laid out for one product
            kernels = sum(self.spans[1:]) * tensor(d, d)
            return branches + (2 + self.levels) * self.row + 4 * B * h * T + kernels
        return branches + (2 + self.levels) * self.row + Add(*self.squares)
