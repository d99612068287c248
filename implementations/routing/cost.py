"""Closed forms of the Routing Transformer. Derivation in README.md."""

from __future__ import annotations

from dataclasses import replace

from sympy import Expr, Integer, Max, Min, Rational, ceiling, floor

from ctxbench.cost import Cost
from ctxbench.cost.symbols import B, C, L, T, d, h, param
from ctxbench.cost.terms import linear, linear_parameters, tensor, triangle
from ctxbench.implementations._shared.forms import (
    block_ffn,
    block_parameters,
    core_backward,
    position_parameters,
    slab_pairs,
)
from ctxbench.implementations.routing.params import BIASES, RoutingParams
from ctxbench.implementations.routing.peaks import peak

TILE = Integer(64)  # queries a tile of the blocked impl
c, K = param("local_block"), param("num_clusters")


def cost(impl: str, mode: str, causal: bool, position: str, params: RoutingParams) -> Cost:
    """One impl in one mode; strict ``blocked`` heads at equally full clusters, see README.md."""
    if impl == "native":  # the same pairs as by the kernels in Triton
        return replace(cost("triton", mode, causal, position, params), peak_bytes=None)
    form = Form(params, causal)
    tokens: Expr = Integer(1) if mode == "decode" else T
    local, routed = form.local_visible(), form.routed_visible()
    if mode == "decode":
        local, routed = form.kept(T) + 1, form.strict_pairs(T + 1) - form.strict_pairs(T)
    common = {
        "projections": L * 2 * B * tokens * d * (3 * d + form.key_width),
        "routing_scores": L * (1 if params.shared else 2) * linear(B * tokens, form.routed_width, K),
        "ffn": block_ffn(tokens),
    }
    algorithmic = {**common, **form.attention(local, routed)}
    flops = {**common, **form.attention(*form.executed(impl, mode, position, local, routed))}
    if mode == "train":
        core = core_backward(impl, position)
        factors = {"local_attention": 1 + core, "routed_attention": 1 + core, "routing_scores": 1}
        algorithmic = {term: value * (1 if term == "routing_scores" else 3) for term, value in algorithmic.items()}
        flops = {term: value * factors.get(term, 3) for term, value in flops.items()}
    return Cost(
        algorithmic=algorithmic,
        flops=flops,
        num_parameters=block_parameters(3 * linear_parameters(d, d) + form.key_parameters())
        + position_parameters(position),
        state_bytes=L * form.state_bytes(T) if causal else Integer(0),
        peak_bytes=peak(impl, mode, causal, params) if position == "none" else None,
        depth=L,
    )


class Form:
    """Widths and pair counts a head of one form over T tokens."""

    def __init__(self, params: RoutingParams, causal: bool):
        self.params, self.earlier = params, causal or params.masked
        self.local_heads = floor(h * Rational(params.local_share))
        self.routed_heads = h - self.local_heads
        self.local_width, self.routed_width = (heads * d / h for heads in (self.local_heads, self.routed_heads))
        self.key_width = self.local_width if params.shared else d

    def attention(self, local: Expr, routed: Expr) -> dict[str, Expr]:
        """FLOPs of the stack for so many pairs a head."""
        return {
            "local_attention": 4 * L * B * self.local_width * local,
            "routed_attention": 4 * L * B * self.routed_width * routed,
        }

    def key_parameters(self) -> Expr:
        """Parameters of the key projection."""
        return linear_parameters(d, self.key_width)

    def local_visible(self) -> Expr:
        """Pairs of a local head: blocks and the block before; bidirectional: and the block after."""
        whole = floor(T / c)
        rest = T - whole * c
        if self.earlier:
            return whole * triangle(c) + triangle(rest) + c * Max(T - c, 0)
        return whole * c**2 + rest**2 + 2 * (c**2 * Max(whole - 1, 0) + c * rest * Min(whole, 1))

    def routed_visible(self) -> Expr:
        """Pairs of a routed head; strict at equally full clusters."""
        if self.params.selection == "strict":
            return self.strict_pairs(T)
        w = self.cluster_size()
        return K * (triangle(w) - (w if self.params.exclude_self else 0) if self.earlier else w**2)

    def strict_pairs(self, tokens: Expr) -> Expr:
        """Pairs of K clusters whose sizes differ by one token at most."""
        m = floor(tokens / K)
        more = tokens - m * K
        if not self.earlier:
            return K * m**2 + more * (2 * m + 1)
        return K * triangle(m) + more * (m + 1) - (tokens if self.params.exclude_self else 0)

    def cluster_size(self) -> Expr:
        """Tokens a centroid takes."""
        return Min(T, param("cluster_size") if self.params.cluster_size else ceiling(T / K))

    def executed(self, impl: str, mode: str, position: str, local: Expr, routed: Expr) -> tuple[Expr, Expr]:
        """Pairs that an impl multiplies, in local and in routed heads."""
        if mode == "decode":
            return (local, routed) if impl == "blocked" else (local, T + 1)
        if impl == "triton":
            return local, routed
        if impl == "blocked":
            runs = self._local_slabs() if position in BIASES else self._local_runs()
            return runs if self.earlier else local, self._tiles() if self._batched else routed
        whole, strict = floor(T / C), self.params.selection == "strict"
        rest = T - whole * C
        if mode == "stream":
            return self._calls(), C**2 * triangle(whole) + rest * T
        return T**2, T**2 if strict else K * self.cluster_size() ** 2

    @property
    def _batched(self) -> bool:
        """Whether clusters are equally large, and their tiles are seen by the tracer."""
        return self.params.selection == "topw" and self.earlier

    def _tiles(self) -> Expr:
        """Tiles of a triangle are multiplied with every key that their last query sees."""
        w = self.cluster_size() - (1 if self.params.exclude_self else 0)
        whole = floor(w / TILE)
        return K * (TILE**2 * triangle(whole) + (w - whole * TILE) * w)

    def _local_runs(self) -> Expr:
        """The first block is a triangle, every later one is multiplied with all of two blocks and masked."""
        return triangle(Min(c, T)) + self._later_blocks(c)

    def _local_slabs(self) -> Expr:
        """With biases a block goes by slabs, each against the block before and its own up to its last query."""
        whole = floor(T / c)
        rest = T - whole * c
        first = slab_pairs(Min(c, T))
        return first + Max(whole - 1, 0) * (c**2 + slab_pairs(c)) + Min(whole, 1) * (rest * c + slab_pairs(rest))

    def _calls(self) -> Expr:
        """A call of one block each: the first meets itself, later ones itself and the block before."""
        return Min(c, T) ** 2 + self._later_blocks(c)

    def _later_blocks(self, size: Expr) -> Expr:
        whole = floor(T / size)
        rest = T - whole * size
        return 2 * size**2 * Max(whole - 1, 0) + rest * (size + rest) * Min(whole, 1)

    def kept(self, tokens: Expr) -> Expr:
        """Tokens that local heads remember."""
        return tokens - c * Max(0, floor(tokens / c) - 1)

    def state_bytes(self, tokens: Expr) -> Expr:
        """Keys and values of local and of routed heads, and one int32 a routed head and token."""
        kept = 2 * tensor(B, self.kept(tokens), self.local_width)
        return kept + 2 * tensor(B, tokens, self.routed_width) + 4 * B * self.routed_heads * tokens
