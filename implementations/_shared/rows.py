"""Heads as rows of a table that index numbers can gather, without a copy of what projections leave token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Numbering(NamedTuple):
    """Token t of head number X = b H + h stands in row ``first[X] + t step`` of a table."""

    first: torch.Tensor
    step: int

    def at(self, tokens: torch.Tensor) -> torch.Tensor:
        """Numbers of rows for tokens ``[B * H, ...]`` of their heads, in the same shape."""
        return tokens * self.step + self.first.to(tokens.dtype).view(-1, *(1,) * (tokens.dim() - 1))


class Rows(NamedTuple):
    """``x: [B, H, T, D]`` as ``table: [N, D]``."""

    table: torch.Tensor
    number: Numbering


def rows_of(x: torch.Tensor) -> Rows:
    """A view of ``x`` where heads lie whole rows apart, as those of a projection do; else a copy."""
    B, H, T, D = x.shape
    if x.stride(3) != 1 or any(stride % D for stride in x.stride()[:3]):
        return rows_of(x.contiguous())
    batch, head, token = (stride // D for stride in x.stride()[:3])
    last = (B - 1) * batch + (H - 1) * head + (T - 1) * token
    return Rows(x.as_strided((last + 1, D), (D, 1)), Numbering(_first(B, H, batch, head, x.device), token))


def token_by_token(B: int, H: int, T: int, device: torch.device) -> Numbering:
    """Numbers of the rows of ``[B, T, H, D]``."""
    return Numbering(_first(B, H, T * H, 1, device), H)


def head_by_head(x: torch.Tensor) -> Numbering:
    """Numbers of the rows of a contiguous ``[B, H, T, D]`` as large as ``x``."""
    B, H, T, _ = x.shape
    return Numbering(_first(B, H, H * T, T, x.device), 1)


def _first(B: int, H: int, batch: int, head: int, device: torch.device) -> torch.Tensor:
    b, h = torch.arange(B, device=device)[:, None], torch.arange(H, device=device)
    return (b * batch + h * head).flatten()
