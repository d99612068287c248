"""Fused causal attention inside groups: the shift is where a slice begins, nothing is rolled and no mask is made.

B batch, H heads, T tokens, D head width, G tokens of a group. Half of the heads cut at 0, G, 2 G, ..., the others at
0, G/2, 3 G/2, ...; whole groups go through one call, stacked into the batch, and the shorter ends through their own.
Biases by distance, which the fused call does not take, go by slabs of queries: one group's serve all that are stacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.positions import Bias, OfHeads, Position
from ctxbench.implementations._shared.slabs import attend_slabs


class Part(OfHeads):
    """The bias of some heads of a layer, and of the circle: the last ``far`` of all ``tokens`` before the first ones.

    What is called an offset here counts keys in that order; distances are those of the sequence.
    """

    def __init__(self, whole: Bias, heads: slice, far: int = 0, tokens: int = 0):
        super().__init__(whole, heads)
        self.far, self.tokens = far, tokens

    def rectangle(self, queries: int, keys: int, offset: int, like: torch.Tensor, step: int = 1) -> torch.Tensor:
        own = super().rectangle(queries, keys - self.far, offset - self.far, like, step)
        if not self.far:
            return own
        beyond = super().rectangle(queries, self.far, offset - self.tokens, like, step)
        return torch.cat((beyond, own), dim=2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: int, wrap: bool, position: Position
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, result of that shape; ``group`` is even. The second half of the heads is shifted."""
    shifted = q.shape[1] // 2
    plain = q.shape[1] - shifted
    by_token = [part.transpose(1, 2) for part in (q, k, v)]  # [B, T, H, D], the order of memory and of the output
    mixed = _cut([part[:, :, :plain] for part in by_token], group, 0, False, _of(position, slice(plain)))
    if shifted:
        own = [part[:, :, plain:] for part in by_token]
        mixed = torch.cat((mixed, _cut(own, group, group // 2, wrap, _of(position, slice(plain, None)))), dim=2)
    return mixed.transpose(1, 2)


def _of(position: Position, heads: slice) -> Part | None:
    """What is added to the scores of these heads."""
    return Part(position, heads) if isinstance(position, Bias) else None


def _cut(qkv: Sequence[torch.Tensor], group: int, head: int, wrap: bool, bias: Part | None) -> torch.Tensor:
    """Groups after the first ``head`` tokens, which are one of their own; ``wrap`` puts these behind the last one."""
    T = qkv[0].shape[1]
    head = min(head, T)
    whole, rest = divmod(T - head, group)
    end = T - rest
    first, last = ([part[:, :head] for part in qkv], [part[:, end:] for part in qkv])
    if wrap and head and 0 < rest <= group // 2:
        pieces, tail = _circle(first, last, T, bias)
    else:
        pieces, tail = ([_causal(part, bias)] if part[0].shape[1] else [] for part in (first, last))
    if whole:
        inside = [part[:, head:end].unflatten(1, (whole, group)).flatten(0, 1) for part in qkv]  # [B * whole, G, H, D]
        pieces.append(_causal(inside, bias).unflatten(0, (-1, whole)).flatten(1, 2))
    pieces += tail
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _circle(
    first: Sequence[torch.Tensor], last: Sequence[torch.Tensor], tokens: int, bias: Part | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The first tokens of a sequence, which see the last ones too, and these."""
    rest = last[0].shape[1]
    joined = [torch.cat(pair, dim=1) for pair in zip(last, first, strict=True)]
    if bias is None:
        mixed = _causal(joined, None)
        return [mixed[:, rest:]], [mixed[:, :rest]]
    both = Part(bias.whole, bias.heads, rest, tokens)
    return [_causal((first[0], *joined[1:]), both)], [_causal(last, bias)]


def _causal(qkv: Sequence[torch.Tensor], bias: Part | None) -> torch.Tensor:
    """Every token sees itself and all before, ``[B, T, H, D]``; under a bias keys may begin before queries."""
    q, k, v = (part.transpose(1, 2) for part in qkv)
    if bias is not None:
        return attend_slabs(q, k, v, True, bias).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2)
