"""Local and routed attention written out (Roy et al. 2020, section 4): the oracle, not the fast path."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.positions import Bias, Position
from ctxbench.implementations.routing.layer import Operators, Rules


def local(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, earlier: bool, position: Position
) -> torch.Tensor:
    """A token sees its block and the one before; bidirectional: the one after too."""
    T, S = q.shape[2], k.shape[2]
    keys = torch.arange(S, device=q.device)
    queries = keys[S - T :, None]
    visible = queries // block - 1 <= keys // block
    visible = visible & (keys <= queries if earlier else keys // block <= queries // block + 1)
    return softmax(q, k, visible, position.rectangle(T, S, S - T, like=q)) @ v


def strict(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """A token sees the tokens of its cluster."""
    T, S = q.shape[2], k.shape[2]
    positions = torch.arange(S, device=q.device)
    visible = query_ids[..., None] == key_ids[..., None, :]
    visible = restricted(visible, positions[S - T :, None], positions, rules)
    return softmax(q, k, visible, position.rectangle(T, S, S - T, like=q)) @ v


def topw(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ids: torch.Tensor, key_ids: torch.Tensor, rules: Rules,
    position: Position,
) -> torch.Tensor:  # fmt: skip
    """A cluster's queries see its keys; a token's result is the mean over its clusters, 0 where it has none."""
    queries, keys, values = members(q, query_ids), members(k, key_ids), members(v, key_ids)
    everything = torch.ones((), dtype=torch.bool, device=q.device)
    visible = restricted(everything, query_ids[..., None], key_ids[..., None, :], rules)
    bias = pair_by_pair(position, query_ids, key_ids, like=q)
    mixed = softmax(queries, keys, visible, bias) @ values  # [B, H, K, w, D]
    total, times = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    place = query_ids.flatten(2)[..., None]
    total = total.scatter_add(2, place.expand(-1, -1, -1, q.shape[3]), mixed.flatten(2, 3))
    times = times.scatter_add(2, place, torch.ones_like(place, dtype=q.dtype))
    return total / times.clamp(min=1)


def members(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of ``x: [B, H, T, D]`` by cluster: ``ids: [B, H, K, w] -> [B, H, K, w, D]``."""
    place = ids.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, place).unflatten(2, ids.shape[2:])


def restricted(visible: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, rules: Rules) -> torch.Tensor:
    """What the rules leave visible, given the positions of queries and keys."""
    if rules.earlier:
        visible = visible & (keys <= queries)
    if rules.exclude_self:
        others = visible & (keys != queries)
        alone = ~others.any(dim=-1, keepdim=True)
        visible = others | (alone & visible)
    return visible


def pair_by_pair(
    position: Position, query_ids: torch.Tensor, key_ids: torch.Tensor, like: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the scores of tokens that lie anywhere, ids ``[B, H, K, w]``: ``[B, H, K, w, w]``."""
    if not isinstance(position, Bias):
        return None
    _, H, T, _ = like.shape
    line = position.bias(torch.arange(1 - T, T, device=like.device), like.dtype)  # [H, 2 T - 1]
    distance = key_ids[..., None, :] - query_ids[..., None]
    return line[torch.arange(H, device=like.device).view(-1, 1, 1, 1), distance + T - 1]


def softmax(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities ``[..., T, S]``."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1)


OPERATORS = Operators(local, strict, topw)
