"""Attention by slabs of queries, for scores that depend on distances: nothing grows as T x S.

For biases and terms that a fused kernel does not take. A slab is BLOCK queries; its scores are computed again in the
backward pass, so that none are kept. Causal slabs end at their last query.

B batch, H heads, n queries of a slab, K keys it sees, S keys in all, D head width, c distances of a slab.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ctxbench.implementations._shared.placed import Placed, biases
from ctxbench.implementations._shared.positions import Position, RelativeTerm
from ctxbench.implementations._shared.staircase import BLOCK


def attend_slabs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, position: Position, step: int = 1,
    before: int | None = None, places: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, T, D]``, ``k, v: [B, H, S, D]``, result ``[B, H, T, D]``; keys are ``step`` tokens apart.

    ``before``: keys ahead of the first query's own; by default queries are the last rows, as a term has them always.
    More than S - T where queries stand beyond keys that all of them see.
    ``places: [B, P]``: of a bias, where the first P keys lie instead, which every query sees; the next key is at 0.
    """
    T, S = q.shape[2], k.shape[2]
    before = S - T if before is None else before
    placed = 0 if places is None else places.shape[1]
    compact = position.compact() if placed else None
    r = position.keys(S - 1, 0 if causal else 1 - T) if isinstance(position, RelativeTerm) else None
    outputs = []
    for begin in range(0, T, BLOCK):
        end = min(begin + BLOCK, T)
        first = before + begin  # position of the first query
        keys = before + end if causal else S
        near = None if r is None else r[:, T - end : T - end + (end - begin) + keys - 1]
        front = None if compact is None or places is None else Placed(compact, places, first - placed)
        operands = (q[:, :, begin:end], k[:, :, :keys], v[:, :, :keys], near, first, causal, position, step, front)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(_attend_slab, *operands, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend_slab(*operands))
    return torch.cat(outputs, dim=2)


def _attend_slab(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, r: torch.Tensor | None, first: int, causal: bool,
    position: Position, step: int, placed: Placed | None,
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, n, D]`` from position ``first`` on, ``k, v: [B, H, K, D]``, ``r: [H, c, D]`` or None."""
    n, K, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    if r is None:
        scores = (q * scale) @ k.transpose(2, 3)
        if placed is not None:
            P, behind = placed.places.shape[1], position.rectangle(n, K - placed.places.shape[1], placed.first, like=q)
            assert behind is not None
            scores[:, :, :, :P] += biases(placed, n, q.dtype)
            scores[:, :, :, P:] += behind
        else:
            bias = position.rectangle(n, K, first, like=q, step=step)
            scores = scores if bias is None else scores + bias
    else:
        assert isinstance(position, RelativeTerm)
        by_distance = ((q + position.position_bias[:, None]) * scale) @ r.transpose(1, 2)  # [B, H, n, c]
        scores = ((q + position.content_bias[:, None]) * scale) @ k.transpose(2, 3) + shift(by_distance, K)
    if causal:
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        scores[:, :, :, K - n :].masked_fill_(future, float("-inf"))
    return scores.softmax(dim=3) @ v


def shift(by_distance: torch.Tensor, keys: int) -> torch.Tensor:
    """From columns by falling distance to columns by key: ``[B, H, n, c] -> [B, H, n, keys]``.

    Row i finds key j in column n - 1 - i + j. With one column more a row, that is a step of c a row through the flat
    rows from n - 1 on (Dai et al. 2019, appendix B); what lies beyond a row's last distance is a later key, hidden.
    """
    n, c = by_distance.shape[2:]
    flat = pad(by_distance, (0, 1)).flatten(2)[:, :, n - 1 : n - 1 + n * c]
    return flat.unflatten(2, (n, c))[:, :, :, :keys]
