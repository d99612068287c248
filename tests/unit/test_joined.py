"""Outputs joined piece by piece: equal to a concatenation, differentiable, and no piece outlives its turn."""

from __future__ import annotations

import gc
import weakref

import torch

from ctxbench.implementations._shared.joined import Joined

SIZES = (3, 5, 1, 4)


def pieces() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, size, 6, generator=generator) for size in SIZES]


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    outputs = Joined(sum(part.shape[1] for part in parts))
    for part in parts:
        outputs.add(part)
    return outputs.result()


def test_pieces_come_one_after_the_other_and_none_is_kept() -> None:
    parts = pieces()
    wanted, outputs = torch.cat(parts, dim=1), Joined(sum(SIZES))
    with torch.no_grad():
        while parts:
            piece = parts.pop(0)
            seen = weakref.ref(piece)
            outputs.add(piece)
            del piece
            gc.collect()
            assert seen() is None
    assert torch.equal(outputs.result(), wanted)


def test_a_piece_that_is_the_whole_is_not_copied() -> None:
    (whole,) = pieces()[:1]
    with torch.no_grad():
        assert joined([whole]) is whole


def test_gradients_reach_every_piece() -> None:
    parts = [part.requires_grad_() for part in pieces()]
    result = joined(parts)
    weights = torch.arange(result.numel(), dtype=torch.float32).view_as(result)
    (result * weights).sum().backward()
    assert torch.equal(torch.cat([part.grad for part in parts], dim=1), weights)
