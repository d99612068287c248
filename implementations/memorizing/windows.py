"""The window as one range of keys, by whatever kernel ``ranges`` has for the device."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared.ranges import Line, Range, attend


def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The last W keys of every query; ``bias: [H, W]`` is 0."""
    seen = Range(k, v, Line(base=1 - bias.shape[1]), Line(base=1))
    return attend(q, [seen], offset=k.shape[2] - q.shape[2], scale=1.0)[0]


def biased_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same with ``bias: [H, W]`` by distance, as a table that runs from the oldest key past the query itself."""
    H, W = bias.shape
    table = torch.cat((bias.flip(1), bias.new_zeros(H, W - 1)), dim=1)
    seen = Range(k, v, Line(base=1 - W), Line(base=1), start=0)
    return attend(q, [seen], offset=k.shape[2] - q.shape[2], scale=1.0, bias=table)[0]


def everything(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment_len: int, memory_len: int) -> torch.Tensor:
    """Each segment's whole memory, a range of the call's own keys that moves in steps; 0 where it is empty."""
    begin = Line(segment_len, segment_len, base=-memory_len)
    return attend(q, [Range(k, v, begin, Line(segment_len, segment_len))], scale=1.0)[0]
