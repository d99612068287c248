"""Clusters of tokens: the two selections, the load, and how centroids are learned.

All functions are pure. B batch, H routed heads, T tokens, D head width, K clusters, w tokens a cluster.
Source: Roy et al. 2020, section 4.1, and the code published with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ctxbench.implementations._shared.selection import best


class Centroids(NamedTuple):
    """What a layer learns without gradients: ``means = sums / counts`` up to smoothing.

    Attributes:
        means: ``[H, K, D]``, what tokens are compared with.
        sums: ``[H, K, D]``, moving average of the sum of assigned vectors a step.
        counts: ``[H, K]``, moving average of their number.
    """

    means: torch.Tensor
    sums: torch.Tensor
    counts: torch.Tensor


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Layer norm without scale and bias: queries and keys lie on a sphere of radius sqrt(D).

    What was stored token by token, ``x: [B, H, T, D]``, remains so.
    """
    if x.dim() == 4 and x.transpose(1, 2).is_contiguous():
        return torch.nn.functional.layer_norm(x.transpose(1, 2), x.shape[-1:]).transpose(1, 2)
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def assigned(vectors: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Of ``vectors: [B, H, T, D]`` the centroids ``[H, K, D]`` with the largest inner product: ``[B, H, T]`` int32.

    A token's own contents decide, so this is causal. No gradient passes.
    """
    return (vectors.detach() @ means.transpose(1, 2)).argmax(dim=3).int()


def taken(vectors: torch.Tensor, means: torch.Tensor, w: int) -> torch.Tensor:
    """The ``w`` tokens nearest to every centroid, ascending: ``[B, H, K, w]``. A token may be in many or in none.

    Of equally near ones at the limit the first are taken.
    """
    similarity = means @ vectors.detach().transpose(2, 3)  # [B, H, K, T]
    return similarity.sort(dim=3, descending=True, stable=True).indices[..., :w].sort(dim=3).values


def taken_in_rounds(vectors: torch.Tensor, means: torch.Tensor, w: int) -> torch.Tensor:
    """The same without sorting whole rows of similarities.

    Which of equally near ones at the limit are taken is left open where hardly any two are: in more than 16 bits.
    """
    similarity = (means @ vectors.detach().transpose(2, 3)).flatten(0, 2)
    _, nearest = best(_ranks(similarity) if similarity.element_size() == 2 else similarity, w)
    return nearest.sort(dim=1).values.view(*vectors.shape[:2], -1, w)


def _ranks(similarity: torch.Tensor) -> torch.Tensor:
    """Integers in the order of similarities ``[n, T]`` of 16 bits, and of equal ones the first is the largest."""
    T = similarity.shape[1]
    bits = (similarity + 0).view(torch.int16)  # no negative zero
    ordered = bits ^ ((bits >> 15) & 0x7FFF)  # below zero, larger bits are smaller numbers
    wide = torch.int32 if T <= 1 << 16 else torch.int64
    return ordered.to(wide).mul_(T).add_(torch.arange(T - 1, -1, -1, dtype=wide, device=similarity.device))


def cluster_sizes(ids: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """The load: how many tokens each cluster holds, ``[B, H, T] -> [B, H, K]``."""
    sizes = torch.zeros(*ids.shape[:2], num_clusters, dtype=torch.int64, device=ids.device)
    return sizes.scatter_add_(2, ids.long(), torch.ones_like(ids, dtype=torch.int64))


def visited_pairs(sizes: torch.Tensor, causal: bool) -> torch.Tensor:
    """Pairs (query, key) that clusters of these sizes really have, head by head: ``[B, H, K] -> [B, H]``."""
    return (sizes * (sizes + 1) // 2 if causal else sizes * sizes).sum(dim=2)


def balanced_pairs(tokens: int, num_clusters: int, causal: bool) -> int:
    """The same for clusters whose sizes differ by one token at most: no contents need fewer."""
    m, more = divmod(tokens, num_clusters)
    if causal:
        return num_clusters * m * (m + 1) // 2 + more * (m + 1)
    return num_clusters * m * m + more * (2 * m + 1)


def updated(centroids: Centroids, vectors: torch.Tensor, decay: float = 0.999, epsilon: float = 1e-5) -> Centroids:
    """One step of online k-means over a batch of ``vectors: [B, H, T, D]``; in single precision at least.

    Counts are smoothed by ``epsilon``, so that a centroid without tokens stays finite.
    """
    K = centroids.means.shape[1]
    ids = assigned(vectors, centroids.means)
    member = torch.nn.functional.one_hot(ids.transpose(0, 1).flatten(1).long(), K)  # [H, B T, K]
    wide = torch.promote_types(vectors.dtype, torch.float32)
    flat = vectors.detach().transpose(0, 1).flatten(1, 2).to(wide)
    counts = decay * centroids.counts.to(wide) + (1 - decay) * member.sum(dim=1)
    sums = decay * centroids.sums.to(wide) + (1 - decay) * member.to(wide).transpose(1, 2) @ flat
    total = counts.sum(dim=1, keepdim=True)
    smoothed = (counts + epsilon) / (total + K * epsilon) * total
    return Centroids(sums / smoothed[:, :, None], sums, counts)


def commitment_loss(vectors: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of vectors to their centroids; its gradient moves the vectors alone.

    The published weight beside the task's loss is 1e-4.
    """
    ids = assigned(vectors, means).long()
    nearest = torch.stack([of_head[index] for of_head, index in zip(means, ids.unbind(1), strict=True)], dim=1)
    return torch.nn.functional.mse_loss(vectors, nearest)
