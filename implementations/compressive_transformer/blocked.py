"""All segments at once: what leaves the memory of a layer, and so its entries, depends on the layer's input alone.

The operator is ``_shared.relative`` over two streams: tokens, and entries in front of them (README, one-shot form).
B batch, T tokens, R rows of the state, F entries.
"""

from __future__ import annotations

from typing import Any

import torch

from ctxbench.implementations._shared.relative import Geometry, attend_token
from ctxbench.implementations._shared.relative import attend as attend_staircase
from ctxbench.implementations._shared.staircase import Far


def attend(layer: Any, x: torch.Tensor, state: Any, keep: bool) -> tuple[torch.Tensor, Any]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return one_shot(layer, x, state, keep, _staircase)


def one_shot(layer: Any, x: torch.Tensor, state: Any, keep: bool, operator: Any) -> tuple[torch.Tensor, Any]:
    """The same, with ``operator(layer, x, rows, geometry, entries or None) -> [B, T, d_model]`` for the attention."""
    params, known = layer.params, state.hidden.shape[1]
    rows = torch.cat((state.hidden, x), dim=1) if known else x
    begin = known - state.phase  # row at which the first, then the last segment of the call begins
    begin += (rows.shape[1] - 1 - begin) // params.segment_len * params.segment_len
    left = max(0, begin - params.mem_len)
    far = _joined(layer, state.compressed, rows[:, :left])
    known_entries = Far(state.compressed.shape[1], params.compressed_len, params.rate)
    geometry = Geometry(params.segment_len, params.mem_len, False, known, state.phase, known_entries)
    mixed = operator(layer, x, rows, geometry, far if far.shape[1] else None)
    return mixed, _after(layer, rows.detach(), left, far, state) if keep else None


def _staircase(
    layer: Any, x: torch.Tensor, rows: torch.Tensor, geometry: Geometry, far: torch.Tensor | None
) -> torch.Tensor:
    if x.shape[1] == 1 and not torch.is_grad_enabled():
        return attend_token(layer, x, rows if far is None else torch.cat((far, rows), dim=1))
    return attend_staircase(layer, x, rows, geometry, far)


def _after(layer: Any, rows: torch.Tensor, left: int, far: torch.Tensor, state: Any) -> Any:
    """State after the call; ``left`` rows are in ``far`` already."""
    params = layer.params
    phase = (state.phase + rows.shape[1] - state.hidden.shape[1]) % params.segment_len
    gone = max(0, rows.shape[1] - params.mem_len) if phase == 0 else left
    entries = _joined(layer, far, rows[:, left:gone])
    compressed = entries if entries is state.compressed else layer.shifted_in(entries, entries[:, :0])
    hidden = rows[:, gone:].clone() if gone or not state.hidden.shape[1] else rows
    return type(state)(compressed, hidden, state.usage, phase)


@torch.no_grad()
def _joined(layer: Any, entries: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Entries, and behind them those of tokens that left the memory since, ``[B, F, d_model]``."""
    if not old.shape[1] or layer.compress is None:
        return entries
    S = layer.params.segment_len
    first = old.shape[1] % S  # the first to leave may be fewer than a segment
    parts = [entries] if entries.shape[1] else []
    if first:
        parts.append(layer.compress(old[:, :first]))
    if old.shape[1] > first:
        together = old[:, first:].unflatten(1, (-1, S)).flatten(0, 1)
        parts.append(layer.compress(together).unflatten(0, (len(old), -1)).flatten(1, 2))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
