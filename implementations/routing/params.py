"""Hyper-parameters of the Routing Transformer, and what its forms can do. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ctxbench.implementations.routing import launch
from ctxbench.method import YES, Dims, Params, Support, no, param

BIASES = ("t5", "alibi")
RANKS = (
    "these kernels hide by the ranks of a cluster's tokens and add nothing by how far apart those stand; blocked does"
)


@dataclass(frozen=True)
class RoutingParams(Params):
    """One layer's heads and clusters; the same in every layer."""

    selection: str = param(
        "strict",
        "strict: every token belongs to its nearest centroid; topw: every centroid takes its cluster_size best tokens",
        choices=("strict", "topw"),
    )
    num_clusters: int = param(16, "centroids of a head", unit="clusters", low=1, source="Roy et al. 2020, enwik8")
    cluster_size: int = param(
        0, "topw: tokens a centroid takes; 0: ceil(T / num_clusters), the published balance", unit="tokens", low=0
    )
    masked: bool = param(
        False, "topw: as in published language models, tokens attend to earlier ones only; the selection still leaks"
    )
    exclude_self: bool = param(
        False, "shared queries and keys: a token attends to itself only where no earlier one is in its cluster"
    )
    local_share: float = param(
        0.5, "share of heads that attend locally, rounded down", unit="of the heads",
        choices=(0.0, 0.25, 0.5, 0.75, 1.0), source="Roy et al. 2020: 0.5 and 0.75",
    )  # fmt: skip
    local_block: int = param(
        256, "local heads: block of a query; it also sees the block before", unit="tokens", low=1,
        source="Roy et al. 2020, WikiText-103",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked and self.selection != "topw":
            raise ValueError("masked=True is a form of selection='topw'; the strict form follows the cell's direction")
        if self.exclude_self and not self.shared:
            raise ValueError("exclude_self=True needs shared queries and keys, received topw with masked=False")

    @property
    def shared(self) -> bool:
        """Whether routed keys are the routed queries, so that a token has one place among the clusters."""
        return self.selection == "strict" or self.masked

    def local_heads(self, num_heads: int) -> int:
        """Heads that attend locally; they come first."""
        return int(num_heads * self.local_share)

    def taken(self, tokens: int) -> int:
        """Tokens that a centroid takes of a sequence (``topw``)."""
        return min(tokens, self.cluster_size or -(-tokens // self.num_clusters))

    def kept(self, tokens: int) -> int:
        """Tokens whose keys and values the local heads keep: the block before the next token's, and its own."""
        return tokens - max(0, tokens // self.local_block - 1) * self.local_block


def support(dims: Dims, params: RoutingParams, mode: str) -> Support:
    """Only the strict form is causal, and only a causal form can be continued."""
    if params.selection == "topw" and dims.causal:
        return no(
            "topw selects over the whole sequence: a later token can push an earlier one out of its cluster, so "
            "earlier outputs depend on later tokens even with masked=True; choose selection=strict or causal=False"
        )
    if params.exclude_self and not (dims.causal or params.masked):
        return no("exclude_self is a rule of causal attention; a bidirectional strict layer has none")
    if mode in ("stream", "decode") and not dims.causal:
        return no("a bidirectional layer cannot be continued: a cluster also holds later tokens")
    return YES


def triton_support(dims: Dims, params: RoutingParams, device: str, dtype: str) -> Support:
    """What the kernels hold in registers, and know of a pair."""
    if dims.position in BIASES:
        return no(f"{dims.position}: {RANKS}")
    return launch.support(dims, params.num_clusters, dtype)


def reach(dims: Dims, params: RoutingParams, i: int) -> set[int]:
    """Input positions that may influence output ``i``: contents decide, so any that the direction allows.

    Where all heads are local, the positions of the blocks.
    """
    T, c = dims.seq_len, params.local_block
    if params.local_heads(dims.num_heads) < dims.num_heads:
        return set(range(i + 1) if dims.causal else range(T))
    first = max(0, i // c - dims.num_layers) * c
    return set(range(first, i + 1 if dims.causal else min(T, (i // c + dims.num_layers + 1) * c)))
