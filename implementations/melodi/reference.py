"""Attention to a window and recall from the long-term memory, all scores written out, empty slots included.

B batch, H heads, n rows that ask, K keys of the window and its short-term memory, F filled slots, D head width. Queries
are unit vectors times the head's scale, keys unit vectors or zeros.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``q: [B, H, n, D]``, ``k, v: [B, H, K, D]``, ``bias: [H, n, K]``; a row that sees no key gets 0."""
    hidden = bias == float("-inf")
    scores = q @ k.transpose(2, 3) + bias.masked_fill(hidden, 0)
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(dim=3)  # uniform in an empty row
    return weights.masked_fill(hidden, 0) @ v


def recall(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, empty: int) -> torch.Tensor:
    """``k, v: [B, H, F, D]`` and ``empty`` slots of zeros, all seen; no positions."""
    B, H, _, D = k.shape
    zeros = k.new_zeros(B, H, empty, D)
    k, v = torch.cat((zeros, k), dim=2), torch.cat((zeros, v), dim=2)
    return (q @ k.transpose(2, 3)).softmax(dim=3) @ v


OPERATORS = SimpleNamespace(attend=attend, recall=recall, takes_bias=True, takes_own=False)
