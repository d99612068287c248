"""FlexAttention over band and prefix under one softmax; global rows are a call of their own, with their own keys."""

from __future__ import annotations

import torch

from ctxbench.implementations._shared import flex
from ctxbench.implementations._shared.flex import Between
from ctxbench.implementations._shared.lines import Line
from ctxbench.implementations._shared.window import GlobalRows, Pattern, Scattered
from ctxbench.implementations._shared.window_ranges import by_distance


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: GlobalRows, scattered: Scattered, pattern: Pattern,
    line: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """``q, k, v: [B, H, T, D]``, result of that shape; neither dilated nor with scattered globals."""
    T, G = q.shape[2], rows.q.shape[2]
    table = by_distance(line, T, pattern)
    seen = [Between(Line(base=-pattern.left), Line(base=1 + pattern.right))]
    if pattern.num_global:
        seen.append(Between(high=Line(stride=0, base=pattern.num_global)))
    score = None if table is None else flex.tabled(table, 0)
    local = flex.attend(q[:, :, G:], k, v, seen, offset=G, score=score)
    if not G:
        return local
    head = flex.attend(rows.q, rows.k, rows.v, flex.CAUSAL if pattern.causal else flex.ALL)
    return torch.cat((head.transpose(1, 2), local.transpose(1, 2)), dim=1).transpose(1, 2)
