"""Fused causal attention inside groups: the shift is where a slice begins, nothing is rolled and no mask is made.

B batch, H heads, T tokens, D head width, G tokens of a group. Half of the heads cut at 0, G, 2 G, ..., the others at
0, G/2, 3 G/2, ...; whole groups go through one call, stacked into the batch, and the shorter ends through their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, wrap: bool) -> torch.Tensor:
    """``q, k, v: [B, H, T, D]``, result of that shape; ``group`` is even. The second half of the heads is shifted."""
    shifted = q.shape[1] // 2
    plain = q.shape[1] - shifted
    by_token = [part.transpose(1, 2) for part in (q, k, v)]  # [B, T, H, D], the order of memory and of the output
    mixed = _cut([part[:, :, :plain] for part in by_token], group, 0, False)
    if shifted:
        mixed = torch.cat((mixed, _cut([part[:, :, plain:] for part in by_token], group, group // 2, wrap)), dim=2)
    return mixed.transpose(1, 2)


def _cut(qkv: Sequence[torch.Tensor], group: int, head: int, wrap: bool) -> torch.Tensor:
    """Groups after the first ``head`` tokens, which are one of their own; ``wrap`` puts these behind the last one."""
    T = qkv[0].shape[1]
    head = min(head, T)
    whole, rest = divmod(T - head, group)
    end = T - rest
    first, last = ([part[:, :head] for part in qkv], [part[:, end:] for part in qkv])
    if wrap and head and 0 < rest <= group // 2:
        circle = _causal([torch.cat(pair, dim=1) for pair in zip(last, first, strict=True)])
        pieces, tail = [circle[:, rest:]], [circle[:, :rest]]
    else:
        pieces, tail = ([_causal(part)] if part[0].shape[1] else [] for part in (first, last))
    if whole:
        inside = [part[:, head:end].unflatten(1, (whole, group)).flatten(0, 1) for part in qkv]  # [B * whole, G, H, D]
        pieces.append(_causal(inside).unflatten(0, (-1, whole)).flatten(1, 2))
    pieces += tail
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _causal(qkv: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every token sees itself and all before, ``[B, T, H, D]``."""
    q, k, v = (part.transpose(1, 2) for part in qkv)
    return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2)
