"""All segments at once: memory, questions and choice depend on the layer's input alone, not on what it computes.

Compressions of the whole call are one product. Then every segment chooses among the items that it has in memory, and
segments that read equally many are stacked into the batch of one fused attention. Such an attention is called as
``fused(q, k, v, position, found, places)``: see :func:`fused`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.products_table import SCORES
from ctxbench.implementations._shared.slabs import attend_slabs
from ctxbench.implementations._shared.staircase import BLOCK
from ctxbench.implementations.compressive_memory.layer import Found, State, kept


def attend(layer: Any, x: torch.Tensor, state: State, keep: bool) -> tuple[torch.Tensor, State | None]:
    """Heads merged, before the output projection: ``[B, T, d_model]``; arguments as in the reference."""
    return schedule(layer, x, state, keep, fused)


def schedule(
    layer: Any, x: torch.Tensor, state: State, keep: bool, fused: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, State | None]:  # fmt: skip
    """The same around another fused attention."""
    S, T = layer.params.segment_len, x.shape[1]
    outputs = []
    opening = min(T, -state.tokens % S)
    if opening:  # the rest of the segment under way
        out, state = _attend_piece(layer, x[:, :opening], state, fused)
        outputs.append(out)
        if state.tokens % S == 0 and (keep or opening < T):
            state = layer.turn(state)
    whole = (T - opening) // S
    end = opening + whole * S
    if whole:
        out, state = _attend_segments(layer, x[:, opening:end], state, keep or end < T, fused)
        outputs.append(out)
    if end < T:
        out, state = _attend_piece(layer, x[:, end:], state, fused)
        outputs.append(out)
    mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return mixed, kept(state) if keep else None


def _attend_piece(
    layer: Any, x: torch.Tensor, state: State, fused: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, State]:  # fmt: skip
    """Consecutive tokens of one segment, and the state with them."""
    q, own_k, own_v = _own(layer, x, state.tokens % layer.params.segment_len)
    k, v = torch.cat((state.k, own_k), dim=2), torch.cat((state.v, own_v), dim=2)
    recent = torch.cat((state.recent, x.detach()), dim=1)
    mixed = merge_heads(fused(q, k, v, layer.position, None, state.places))
    return mixed, State(state.compressed, recent, k, v, state.places, state.tokens + x.shape[1])


def _own(layer: Any, x: torch.Tensor, fill: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of tokens that begin ``fill`` tokens into their segments."""
    q, k, v = (split_heads(project(x), layer.num_heads) for project in (layer.q, layer.k, layer.v))
    return *layer.position.both(q, k, fill), v


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: Position, found: Found | None,
    places: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The last key is the last query's own; what is ``found`` stands in front and is seen by all.

    ``places``: of a bias by distance, where the retrieved rows in front stand, ``[B, k n]``; the next key stands at 0.
    """
    k, v = joined(k, v, found)
    m, K = q.shape[2], k.shape[2]
    if places is not None:  # the fused kernel adds no bias by itself
        rows = max(1, SCORES // (q.shape[1] * min(m, BLOCK) * K))  # of the batch: as many as a slab's scores may be
        split = zip(*(x.split(rows) for x in (q, k, v, places)), strict=True)
        return torch.cat([attend_slabs(a, b, c, True, position, places=at) for a, b, c, at in split])
    visible = torch.ones(m, K, dtype=torch.bool, device=q.device).tril(K - m) if m > 1 else None
    return scaled_dot_product_attention(q, k, v, attn_mask=visible)


def joined(k: torch.Tensor, v: torch.Tensor, found: Found | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Own keys and values behind what is ``found``."""
    if found is None:
        return k, v
    return torch.cat((found.k, k), dim=2), torch.cat((found.v, v), dim=2)


def _attend_segments(
    layer: Any, x: torch.Tensor, state: State, turn: bool, fused: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, State]:  # fmt: skip
    """Whole segments ``[B, w S, d_model]``; ``turn``: whether the state must be that of the segment after them."""
    params, n = layer.params, layer.params.item_len
    S, begin = params.segment_len, state.tokens
    count = x.shape[1] // S
    recent = torch.cat((state.recent, x.detach()), dim=1)
    last = begin + (count if turn else count - 1) * S  # the last moment at which items are retrieved
    old = (params.compressions(last) - params.compressions(begin)) * n * params.rate
    compressed = state.compressed
    if old and params.compressed_len:
        compressed = torch.cat((compressed, layer.entries(recent[:, :old])), dim=1)
    memory = _Memory(layer, compressed, recent, begin)

    segments = x.unflatten(1, (count, S))  # [B, w, S, d_model]
    outputs, found = [], Found(state.k, state.v, state.places)
    # The state has already read for the first segment.
    for (first, _, _), run in groupby(range(count), key=lambda s: (s == 0, *memory.form(begin + s * S))):
        numbers = list(run)
        if not first:
            found = memory.read([begin + s * S for s in numbers])
        out = _attend_stacked(layer, segments[:, numbers[0] : numbers[-1] + 1].flatten(0, 1), found, fused)
        outputs.append(out.unflatten(0, (len(x), -1)).flatten(1, 2))
    mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    end = begin + count * S
    if not turn:
        return mixed, State(compressed, recent, *found, end)
    found = memory.read([end])
    surplus = compressed.shape[1] - params.compressed(end) * n
    return mixed, State(compressed[:, surplus:], recent[:, recent.shape[1] - params.recent(end) * n :], *found, end)


def _attend_stacked(
    layer: Any, x: torch.Tensor, found: Found, fused: Callable[..., torch.Tensor]
) -> torch.Tensor:  # fmt: skip
    """Segments as batch rows, ``[B w, S, d_model]``, with what each retrieved."""
    return merge_heads(fused(*_own(layer, x, 0), layer.position, found, found.places))


class _Memory:
    """Items of a whole call, and what each of its segments finds in them."""

    def __init__(self, layer: Any, compressed: torch.Tensor, recent: torch.Tensor, begin: int):
        self.layer, self.params = layer, layer.params
        n = self.params.item_len
        self.compressed, self.recent = (rows.unflatten(1, (-1, n)) for rows in (compressed, recent))
        # Numbers, counted from the first of the sequence, of the first items at hand.
        self.first_compressed = self.params.compressions(begin) - self.params.compressed(begin)
        self.first_recent = begin // n - self.params.recent(begin)
        self.recent_rows = recent

    def form(self, tokens: int) -> tuple[int, bool]:
        """How many items the segment that begins there reads, and whether compressed ones are among its choices."""
        return self.params.retrieved(tokens), self.params.compressed(tokens) > 0

    def read(self, begins: list[int]) -> Found:
        """What segments of one form retrieve, each a row of the batch: keys and values ``[B w, H, k n, D]``."""
        layer, params = self.layer, self.params
        with_compressed = self.form(begins[0])[1]
        items = torch.cat((self.compressed, self.recent), dim=1) if with_compressed else self.recent
        offset = self.compressed.shape[1] if with_compressed else 0
        known, among = self._choices(begins, offset)
        B = len(items)
        means = layer.mean(items, dim=2)  # [B, all, d_model]
        ends = torch.tensor(begins) - self.first_recent * params.item_len  # rows of ``recent`` at which they begin
        windows = self.recent_rows.unfold(1, params.segment_len, params.item_len)  # [B, places, d_model, S]
        asked = windows[:, (ends - params.segment_len) // params.item_len]  # [B, w, d_model, S]
        question = layer.mean(asked, dim=3)
        choice = layer.similarity(question, means[:, among.to(means.device)])  # [B, w, widest]
        choice = choice.masked_fill(~known.to(choice.device), float("-inf"))
        place = choice.topk(params.retrieved(begins[0]), dim=2).indices.sort(dim=2).values
        gate = layer.weight(choice.gather(2, place)).to(items.dtype)
        number = among.to(place.device).expand(B, -1, -1).gather(2, place)  # [B, w, k]
        found = items[torch.arange(B, device=place.device)[:, None, None], number]
        kinds = ((self.first_compressed, offset), (self.first_recent, self.recent.shape[1]))
        at_hand = (range(first, first + count) for first, count in kinds)
        return layer.read(found.flatten(0, 1), gate.flatten(0, 1), layer.places(number, *at_hand, begins))

    def _choices(self, begins: list[int], offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Items at hand for each segment, by their place among all: which entries count, and the places."""
        lists = []
        for tokens in begins:
            compressed, recent = self.params.numbers(tokens)
            places = [item - self.first_compressed for item in compressed]
            lists.append(places + [offset + item - self.first_recent for item in recent])
        widest = max(map(len, lists))
        known = torch.tensor([[True] * len(each) + [False] * (widest - len(each)) for each in lists])
        return known, torch.tensor([each + [0] * (widest - len(each)) for each in lists])
