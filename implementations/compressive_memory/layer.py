"""Causal attention inside segments that also reads items retrieved from a memory of earlier segments.

B batch, T tokens, S segment_len, n item_len, c rate, H heads, D head width, W items in memory, k of them retrieved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, linear

from ctxbench.implementations._shared.blocks import PreNormBlock, Stack, split_heads
from ctxbench.implementations._shared.positions import Bias, Position, Rotary
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.compressive_memory.params import CompressiveMemoryParams
from ctxbench.method import Dims, Output, load


class State(NamedTuple):
    """The memory and the segment under way, after ``tokens`` tokens.

    ``compressed: [B, w n, d_model]`` and ``recent: [B, r n + fill, d_model]`` are entries and tokens as the layer's
    norm leaves them, the segment's own tokens last; ``k, v: [B, H, k n + fill, D]`` belong to the retrieved items and
    the segment's own tokens, k rotated where the position encoding rotates, counted from the segment's beginning.
    ``places: [B, k n]`` int32, where it adds a bias by distance instead: where the retrieved rows stand, counted alike.
    """

    compressed: torch.Tensor
    recent: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    places: torch.Tensor | None
    tokens: int


class Found(NamedTuple):
    """Keys and weighted values ``[B, H, k n, D]`` of retrieved items, and ``places`` as in the state."""

    k: torch.Tensor
    v: torch.Tensor
    places: torch.Tensor | None


class CompressiveMemory(nn.Module):
    """Weights, compression and retrieval around ``attend(layer, x, state, keep) -> (mixed, state)``.

    ``compress`` makes one entry of c neighbours; ``question`` maps a segment's mean to what the next one looks for; the
    value of a retrieved item is weighted by ``sigmoid(gate[0] cos + gate[1])``, cos its similarity.
    """

    def __init__(self, dims: Dims, params: CompressiveMemoryParams, attend: Any, position: Position):
        super().__init__()
        d_model = dims.d_model
        self.num_heads, self.params, self.attend, self.position = dims.num_heads, params, attend, position
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.question = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Parameter(torch.tensor([4.0, 0.0]))
        compresses = params.compressed_len > 0
        self.compress = (
            nn.Sequential(nn.Linear(params.rate * d_model, 2 * d_model), nn.ReLU(), nn.Linear(2 * d_model, d_model))
            if compresses
            else None
        )

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        before = self.init_state(x.shape[0]) if state is None else state
        mixed, after = self.attend(self, x, before, keep=state is not None)
        return Output(self.o(mixed), after)

    def entries(self, old: torch.Tensor) -> torch.Tensor:
        """Compression of tokens, c neighbours to one: ``[B, m, d_model] -> [B, m / c, d_model]``; weights learn."""
        assert self.compress is not None
        return self.compress(old.unflatten(1, (-1, self.params.rate)).flatten(2))

    def turn(self, state: State) -> State:
        """The state in which the next segment begins: the oldest items compressed, items retrieved for it."""
        params = self.params
        old = max(0, state.recent.shape[1] - params.recent_len)
        compressed, recent = state.compressed, state.recent[:, old:]
        if old and params.compressed_len:
            compressed = torch.cat((compressed, self.entries(state.recent[:, :old])), dim=1)
            compressed = compressed[:, max(0, compressed.shape[1] - params.compressed_len) :]
        rows = torch.cat((compressed, recent), dim=1) if compressed.shape[1] else recent
        items = rows.unflatten(1, (-1, params.item_len))  # [B, W, n, d_model]
        question = self.mean(state.recent[:, state.recent.shape[1] - params.segment_len :])
        found, gate, chosen = self.retrieve(question, items, self.mean(items, dim=2))
        places = self.places(chosen[:, None], *params.numbers(state.tokens), [state.tokens])
        return State(compressed, recent, *self.read(found, gate, places), state.tokens)

    @staticmethod
    def mean(rows: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Mean of rows, at least in fp32: the choice of items should not hang on rounding."""
        return rows.mean(dim=dim, dtype=torch.promote_types(rows.dtype, torch.float32))

    def retrieve(
        self, question: torch.Tensor, items: torch.Tensor, means: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The most similar items in order of time, ``[B, k, n, d_model]``, weights of their values and which they are.

        Args:
            question: mean of the segment before, ``[B, d_model]``.
            items: ``[B, W, n, d_model]``.
            means: of the items, ``[B, W, d_model]``.
        """
        similarity = self.similarity(question, means)
        chosen = similarity.topk(min(self.params.top_k, items.shape[1]), dim=1).indices.sort(dim=1).values
        batch = torch.arange(len(items), device=items.device)[:, None]
        found = items[batch, chosen]  # gather would keep all items for the backward pass
        return found, self.weight(similarity.gather(1, chosen)).to(items.dtype), chosen

    def similarity(self, question: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Cosines of mapped questions ``[*, d_model]`` and means ``[*, W, d_model]``: ``[*, W]``."""
        asked = linear(question, self.question.weight.to(question.dtype))
        return cosine_similarity(asked[..., None, :], means, dim=-1)

    def weight(self, similarity: torch.Tensor) -> torch.Tensor:
        """Weight of an item's values."""
        gate = self.gate.to(similarity.dtype)
        return torch.sigmoid(gate[0] * similarity + gate[1])

    def places(self, chosen: torch.Tensor, compressed: range, recent: range, begins: list[int]) -> torch.Tensor | None:
        """Where rows of chosen items stand, ``[B w, k n]``; None where no encoding asks for it.

        An entry stands where the last of the tokens it is made of did, whatever the encoding does with it.

        Args:
            chosen: for each of w segments, which of the compressed and then the recent items it reads, ``[B, w, k]``.
            compressed: numbers of the compressed items, see :meth:`..params.CompressiveMemoryParams.numbers`.
            recent: numbers of the recent items.
            begins: first tokens of the segments, from which positions count.
        """
        if not isinstance(self.position, (Rotary, Bias)):
            return None
        places = torch.tensor(self.params.places(compressed, recent), device=chosen.device)[chosen]
        begin = torch.tensor(begins, device=chosen.device)[:, None, None]
        return (places - begin).flatten(0, 1).flatten(1)

    def read(self, found: torch.Tensor, gate: torch.Tensor, places: torch.Tensor | None) -> Found:
        """Items ``[B, k, n, d_model]`` with rows at ``places``: a rotation uses these up, a bias keeps them."""
        rows = found.flatten(1, 2)
        k = split_heads(self.k(rows), self.num_heads)
        v = (self.v(rows).unflatten(1, found.shape[1:3]) * gate[:, :, None, None]).flatten(1, 2)
        if places is not None:
            k = self.position.rotate(k, places[:, None])  # for all heads
        kept = None if places is None or not isinstance(self.position, Bias) else places.int()
        return Found(k, split_heads(v, self.num_heads), kept)

    def init_state(self, batch_size: int) -> State:
        return self._state(batch_size, 0, torch.zeros)

    def state_at(self, batch_size: int, context: int) -> State:
        return self._state(batch_size, context, torch.randn)

    def _state(self, batch_size: int, context: int, make: Any) -> State:
        params, weight, n = self.params, self.q.weight, self.params.item_len
        d_model, H = weight.shape[0], self.num_heads
        fill = context % params.segment_len
        begin = context - fill

        def tensor(*shape: int) -> torch.Tensor:
            return make(batch_size, *shape, device=weight.device, dtype=weight.dtype)

        found = params.retrieved(begin)
        cached = (H, found * n + fill, d_model // H)
        compressed, recent = params.compressed(begin) * n, params.recent(begin) * n + fill
        places = None
        if isinstance(self.position, Bias):  # of the last items in memory
            last = torch.tensor(params.places(*params.numbers(begin)), dtype=torch.int32, device=weight.device)
            places = (last.view(-1, n)[len(last) - found :].flatten() - begin).repeat(batch_size, 1)
        rows = tensor(compressed, d_model), tensor(recent, d_model)
        return State(*rows, tensor(*cached), tensor(*cached), places, context)


def kept(state: State) -> State:
    """The same state cut from its graph; parts of longer tensors are copied, so that these do not stay alive."""

    def exact(part: torch.Tensor) -> torch.Tensor:
        part = part.detach()
        return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()

    places = None if state.places is None else exact(state.places)
    return State(exact(state.compressed), exact(state.recent), exact(state.k), exact(state.v), places, state.tokens)


def build(dims: Dims, params: CompressiveMemoryParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Stack of ``num_layers`` pre-norm layers; ``as_written`` brings a stack of its own."""
    from ctxbench.implementations.compressive_memory import METHOD

    run = load(METHOD.impl(impl).run)
    if impl == "as_written":
        module: nn.Module = run(dims, params)
    else:
        farthest = params.segment_len + params.recent_len + params.compressed_len * params.rate
        positions = positions_of(dims.replace(seq_len=min(dims.seq_len, farthest)), impl)
        module = Stack([PreNormBlock(CompressiveMemory(dims, params, run, each), dims) for each in positions])
    return module.to(device, dtype)
