"""Allocator peaks: what is alive together at the worst moment.

``topw``, purely local layers and bidirectional training of ``blocked`` have no formula. Those of ``triton`` are exact.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, Rational, floor

from ctxbench.cost.symbols import B, C, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.forms import stack_peak
from ctxbench.implementations.routing.params import RoutingParams

c, K = param("local_block"), param("num_clusters")


def peak(impl: str, mode: str, causal: bool, params: RoutingParams) -> Expr | None:
    """One impl in one mode, or None."""
    if params.selection == "topw" or params.local_share == 1:
        return None
    if impl == "triton":
        return Kernels(params).peak(mode)
    if (impl, mode, causal) == ("blocked", "train", False):
        return None
    sizes = _Sizes(impl, params)
    if mode == "forward":
        return stack_peak(T, sizes.mixing(T, T, T))
    if mode == "train":
        return sizes.train()
    if mode == "decode":
        return sizes.call(Integer(1), T, Integer(0))
    whole = floor(T / C) * C
    rest = T - whole
    # The output of the call before is alive too.
    earlier = tensor(B, C, d)
    last_whole = Min(whole, 1) * sizes.call(C, Max(whole - C, 0), earlier * Min(floor(whole / (2 * C)), 1))
    return largest(last_whole, Min(rest, 1) * sizes.call(rest, whole, earlier))


class _Sizes:
    """Bytes by what they hold; the widths of local, routed and key heads are fractions of a row."""

    def __init__(self, impl: str, params: RoutingParams):
        self.fused = impl == "blocked"
        self.local_heads = floor(h * Rational(params.local_share))
        self.routed_heads = h - self.local_heads
        self.local, self.routed = (heads * d / h for heads in (self.local_heads, self.routed_heads))
        self.any_routed = Min(self.routed_heads, 1)

    def mixing(self, tokens: Expr, keys: Expr, local_keys: Expr, appended: Expr | int = 0) -> Expr:
        """Inside the mixer: norm, q, v, k of local heads, and the worst of the two kinds of heads, local ones first.

        ``appended``: the state of the routed heads, which those of the local heads do not meet.
        """
        row, narrow = tensor(B, tokens, d), tensor(B, tokens, self.local)
        own = 3 * row + narrow
        if self.fused:
            local = 2 * narrow + self.mask(tokens)  # blocks, and the blocks joined
            routed = narrow + 2 * tensor(B, tokens, self.routed) + 4 * B * self.routed_heads * tokens
        else:  # scores, masked scores and two masks
            local = self.local_heads * 2 * e * B * tokens * local_keys + 2 * tokens * local_keys
            hidden = B * self.routed_heads * tokens * keys
            routed = narrow + tensor(B, tokens, self.routed) + (2 * e + 2) * hidden
        return own + largest(local * Min(self.local_heads, 1), (routed + appended) * self.any_routed)

    def mask(self, tokens: Expr) -> Expr:
        """What later tokens of a block are hidden with; a single token needs none."""
        return e * 2 * c * c * Min(self.local_heads, tokens - 1, 1)

    def train(self) -> Expr:
        """The backward pass of the top layer, in its FFN or in its routed heads."""
        row, hidden, statistics = tensor(B, T, d), tensor(B, T, f), 2 * e * B * T
        narrow, routed = tensor(B, T, self.local), tensor(B, T, self.routed)
        # norm, q, v and normalised q (for routed heads), merged heads and the residual; norms' statistics
        kept = (5 + self.any_routed) * row + statistics * (1 + self.routed_heads)
        if self.fused:  # runs of two blocks; clusters
            kept += 4 * narrow + 4 * B * self.routed_heads * T + self.mask(T)
            core = largest(3 * routed, narrow)
        else:  # scaled queries; probabilities and masks
            kept += row + e * B * h * T * T + T * T * Min(self.local_heads, 1) + B * self.routed_heads * T * T
            core = 2 * e * T * T * B * largest(self.routed_heads, self.local_heads)
        kept += when_ffn(2 * row + 2 * hidden + statistics)
        in_ffn = when_ffn(kept + hidden + e * (d * f + d))
        # The FFN's part is freed but for gradients; that of the merged heads takes the place of their values.
        gradients = e * (d * d + d) + when_ffn(row + e * (2 * d * f + f + 3 * d))
        of_ffn = when_ffn(2 * row + 2 * hidden + statistics)
        return (L - 1) * kept + largest(in_ffn, kept - of_ffn + core + gradients)

    def call(self, tokens: Expr, before: Expr, earlier: Expr) -> Expr:
        """A call after ``before`` tokens; the state before it counts where the mode carries one."""
        after = before + tokens
        appended = self.routed_state(after)
        states = L * self.state(after) - appended
        local_keys = self.kept(before) + tokens
        joined = 2 * tensor(B, local_keys - self.kept(after), self.local)
        if earlier != 0:
            states += L * self.state(before)
        row = tensor(B, tokens, d)
        positions = 0 if self.fused else 8 * after
        mixing = self.mixing(tokens, after, local_keys, appended + positions) + joined
        feed = when_ffn(2 * row + 2 * tensor(B, tokens, f) + appended)
        return states + earlier + largest(mixing, feed) + Min(L - 1, 1) * row

    def state(self, tokens: Expr) -> Expr:
        """Keys and values of local and of routed heads, and the clusters."""
        return 2 * tensor(B, self.kept(tokens), self.local) + self.routed_state(tokens)

    def routed_state(self, tokens: Expr) -> Expr:
        """The part that grows with every token."""
        return 2 * tensor(B, tokens, self.routed) + 4 * B * self.routed_heads * tokens

    def kept(self, tokens: Expr) -> Expr:
        """Tokens that local heads remember."""
        return tokens - c * Max(0, floor(tokens / c) - 1)


class Kernels(_Sizes):
    """The Triton impl: lists of clusters instead of scores, a log-sum-exp a query, no mask."""

    def __init__(self, params: RoutingParams):
        super().__init__("triton", params)
        self.begins = 4 * B * self.routed_heads * (K + 1)

    def peak(self, mode: str) -> Expr:
        """Bytes of one mode."""
        if mode == "forward":
            row = tensor(B, T, d)
            found = self.numbers(T) + self.begins
            routed = 2 * tensor(B, T, self.routed) + found + 2 * self.numbers(T)
            sorting = tensor(B, T, self.routed) + self.numbers(T) + self.sorting(T)
            # Norm, q, v, k of local heads; what these found, or all that routed heads need beside it.
            own = 3 * row + 2 * tensor(B, T, self.local)
            return stack_peak(T, own + largest(4 * B * self.local_heads * T, routed, sorting))
        if mode == "train":
            return self.train()
        if mode == "decode":
            return self.call(Integer(1), T, Integer(0))
        whole = floor(T / C) * C
        rest = T - whole
        last_whole = Min(whole, 1) * self.call(C, Max(whole - C, 0), tensor(B, Min(whole - C, C), d))
        return largest(last_whole, Min(rest, 1) * self.call(rest, whole, tensor(B, Min(whole, C), d)))

    def numbers(self, tokens: Expr) -> Expr:
        """Four bytes a routed head and token."""
        return 4 * B * self.routed_heads * tokens

    def sorting(self, tokens: Expr) -> Expr:
        """Clusters in order, the order in 64 and in 32 bits, bounds and where clusters begin."""
        return 4 * self.numbers(tokens) + 2 * self.begins

    def train(self) -> Expr:
        """The top layer's backward pass: in its FFN, in its routed heads or in its local ones."""
        row, hidden, statistics = tensor(B, T, d), tensor(B, T, f), 2 * e * B * T
        narrow, routed = tensor(B, T, self.local), tensor(B, T, self.routed)
        # Of routed heads: normalised q with its statistics, what was found and its log-sum-exps, the lists.
        clusters = 2 * routed + 2 * e * B * self.routed_heads * T + 2 * self.numbers(T) + self.begins
        # Norm, q, v, the residual and its statistics; keys of local heads, what these found and its log-sum-exps.
        kept = 4 * row + statistics + 2 * narrow + 4 * B * self.local_heads * T
        of_ffn = when_ffn(2 * row + 2 * hidden + statistics)
        layer = kept + clusters + row + of_ffn  # with heads merged
        in_ffn = when_ffn(layer + hidden + e * (d * f + d))
        gradients = row + e * (d * d + d) + when_ffn(row + e * (2 * d * f + f + 3 * d))
        in_clusters = clusters + 3 * routed
        in_blocks = Min(self.local_heads, 1) * (2 * row + 3 * narrow)  # q and v have gradients with zeros by now
        return (L - 1) * layer + largest(in_ffn, kept + gradients + largest(in_clusters, in_blocks))

    def call(self, tokens: Expr, before: Expr, earlier: Expr) -> Expr:
        """The last layer of a call after ``before`` tokens; ``earlier``: the output of the call before it, if any."""
        after, row = before + tokens, tensor(B, tokens, d)
        narrow, routed = tensor(B, tokens, self.local), tensor(B, tokens, self.routed)
        states = (L - 1) * self.state(after) + (L * self.state(before) if earlier != 0 else 0)
        keys, kept = self.kept(before) + tokens, self.kept(after)
        cut = Min(keys - kept, 1) * kept  # else the joined keys are the state
        local = narrow + 2 * tensor(B, keys + cut, self.local) + 4 * B * self.local_heads * tokens
        own, all_keys = self.numbers(tokens), self.numbers(after)
        lists = largest(
            own + self.sorting(after),
            own + all_keys + self.begins + self.sorting(tokens),
            own + all_keys + 2 * self.begins + routed + 2 * own,
        )
        in_clusters = narrow + 2 * tensor(B, kept, self.local) + routed + self.routed_state(after) + lists
        feed = when_ffn(2 * row + 2 * tensor(B, tokens, f) + self.state(after))
        mixing = 3 * row + narrow + largest(local * Min(self.local_heads, 1), in_clusters)
        return states + earlier + largest(mixing, feed) + Min(L - 1, 1) * row
