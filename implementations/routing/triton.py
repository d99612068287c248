"""Kernels of our own: clusters found, listed and attended to on the device, no row gathered outside a loop.

``strict``: tokens are sorted by cluster, and every cluster is a run of the list. ``topw``: every cluster's result and
gradients are by slot of the list, and each token adds up its own slots in their order.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations.routing.choosing import add_up, best_tokens, chosen, clustered, nearest, runs
from ctxbench.implementations.routing.gathered import Lists, gathered, gathered_backward
from ctxbench.implementations.routing.layer import Operators, Rules
from ctxbench.implementations.routing.native import local
from ctxbench.implementations.routing.routing import balanced_pairs


def taken(vectors: torch.Tensor, means: torch.Tensor, w: int) -> torch.Tensor:
    """``routing.taken`` without its sorts."""
    ids: torch.Tensor = best_tokens(means @ vectors.detach().transpose(2, 3), w)
    return ids


def strict(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """Charged for equally full clusters, as ``blocked`` is."""
    T, S, (clusters, earlier, without_self) = q.shape[2], k.shape[2], rules
    pairs = balanced_pairs(S, clusters, earlier) - balanced_pairs(S - T, clusters, earlier) - T * without_self
    mixed: torch.Tensor = _Once.apply(q, k, v, clustered(query_ids, key_ids, clusters), (pairs, earlier, without_self))
    return mixed


def topw(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """All clusters are equally full, so the charge is exact."""
    K, w = query_ids.shape[2:]
    pairs = K * (w * (w + 1) // 2 - w * rules.exclude_self if rules.earlier else w * w)
    rest = pairs, rules.earlier, rules.exclude_self
    mixed: torch.Tensor = _Mean.apply(q, k, v, chosen(query_ids, key_ids), rest)
    return mixed


class _Once(torch.autograd.Function):
    """Every query belongs to one cluster: results and gradients are by token."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        lists, ctx.rest = rest
        out, lse = gathered(q, k, v, *lists, *ctx.rest, False)
        ctx.save_for_backward(q, k, v, *lists, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *operands, out, lse = ctx.saved_tensors
        return *gathered_backward(gradients[0], out, lse, None, *operands, *ctx.rest), None, None


class _Mean(torch.autograd.Function):
    """A query belongs to any number of clusters: the mean of their results."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        lists, ctx.rest = rest
        ctx.shared = lists.queries is lists.keys
        parts, lse = gathered(q, k, v, *lists, *ctx.rest, True)
        slots, begins = runs(lists.queries, q.shape[2])
        ctx.save_for_backward(q, k, v, *lists, parts, lse, slots, begins)
        out: torch.Tensor = add_up(parts, slots, begins, q, True)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *lists, parts, lse, slots, begins = ctx.saved_tensors
        share = begins.diff(dim=1).clamp_(min=1).float().reciprocal_()
        parts = gathered_backward(gradients[0], parts, lse, share, q, k, v, *lists, *ctx.rest)
        own = (slots, begins) if ctx.shared else runs(Lists(*lists).keys, k.shape[2])
        listed = ((slots, begins), own, own)
        sums = (add_up(part, *at, x, False) for part, at, x in zip(parts, listed, (q, k, v), strict=True))
        return *sums, None, None


OPERATORS = Operators(local, strict, topw, nearest, taken)
