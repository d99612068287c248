"""``full`` attention of a piece in causal and whole parts, for operators that keep no scores.

``full`` differs from causal in two corners. Read tokens see themselves only and write tokens see everything, so each
group is one more product without a mask, and the rows between stay causal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctxbench.implementations.rmt.layer import Rows


def by_corners(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows, full: bool,
    operator: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]`` whose last n are the piece's own; ``[B, H, n, D]``.

    ``operator(q, k, v, causal)``: the last query sees every key, and where causal each one before it a key fewer.
    """
    if not full or not (rows.reads or rows.writes):
        return operator(q, k, v, True)
    body, keys, reads = rows.reads + rows.tokens, k.shape[2] - rows.writes, rows.reads
    parts = [operator(q[:, :, :body], k[:, :, :keys], v[:, :, :keys], True)]
    if reads:  # as queries; as keys all tokens see them anyway
        first = operator(q[:, :, :reads], k[:, :, :reads], v[:, :, :reads], False)
        parts = [first, parts[0][:, :, reads:]]
    if rows.writes:
        parts.append(operator(q[:, :, body:], k, v, False))
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)  # heads inside, as they came
