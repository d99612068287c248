"""Memory tokens around every segment of a causal transformer (Bulatov et al. 2022, section 3).

B batch, T tokens, S tokens a segment, m memory tokens, n rows of a piece, K keys, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import FeedForward, merge_heads, split_heads
from ctxbench.implementations._shared.graph import replaying
from ctxbench.implementations._shared.joined import Joined
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.products import buffers_kept
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.rmt.params import RMTParams
from ctxbench.method import Dims, Output, load


class Cache(NamedTuple):
    """Keys and values of one layer for the rows of a segment so far, ``[B, H, m + fill, D]``.

    Keys are rotated where the position encoding rotates, by their index among these rows.
    """

    k: torch.Tensor
    v: torch.Tensor


class State(NamedTuple):
    """What the next token needs, detached.

    ``memory: [B, m, d_model]`` is what the segment under way reads; ``caches`` has one entry a layer, without rows
    where no segment is under way; ``tokens`` counts all tokens so far.
    """

    memory: torch.Tensor
    caches: tuple[Cache, ...]
    tokens: int


class Rows(NamedTuple):
    """Rows of a piece of a segment, in this order; only its first piece has reads, only its last has writes."""

    reads: int
    tokens: int
    writes: int


Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rows, bool, Position], torch.Tensor]


class Block(nn.Module):
    """Pre-norm layer around an operator whose result is ``[B, H, n, D]``; ``d_ff = 0`` drops the network."""

    def __init__(self, dims: Dims, full: bool, operator: Operator, position: Position):
        super().__init__()
        d_model = dims.d_model
        self.num_heads, self.full, self.operator, self.position = dims.num_heads, full, operator, position
        self.norm_mixer = nn.LayerNorm(d_model)
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.norm_ffn = nn.LayerNorm(d_model) if dims.d_ff else None
        self.ffn = FeedForward(d_model, dims.d_ff) if dims.d_ff else None

    def forward(self, x: torch.Tensor, cache: Cache | None, rows: Rows, unread: int) -> tuple[torch.Tensor, Cache]:
        """``x: [B, n, d_model]`` and the keys before it to outputs without the first ``unread`` rows, and all keys."""
        normed = self.norm_mixer(x)
        q, k, v = (split_heads(project(normed), self.num_heads) for project in (self.q, self.k, self.v))
        del normed
        index = 0 if cache is None else cache.k.shape[2]  # of the first row in its segment
        q, k = self.position.both(q, k, index)
        if cache is not None:
            k, v = torch.cat((cache.k, k), dim=2), torch.cat((cache.v, v), dim=2)
        mixed = self.operator(q, k, v, rows, self.full, self.position)[:, :, unread:]
        del q
        x = x[:, unread:] + self.o(merge_heads(mixed))
        del mixed
        if self.ffn is not None and self.norm_ffn is not None:
            x = x + self.ffn(self.norm_ffn(x))
        return x, Cache(k, v)


class RMT(nn.Module):
    """The stack. Memory leaves it at the top and enters it at the bottom, so segments follow one another."""

    def __init__(self, dims: Dims, params: RMTParams, operator: Operator, impl: str = ""):
        super().__init__()
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.params = params
        self.memory = nn.Parameter(torch.randn(params.num_memory, dims.d_model))
        rows = min(dims.seq_len, params.segment_len) + 2 * params.num_memory  # no distance is longer
        positions = positions_of(dims.replace(seq_len=rows), impl)
        self.layers = nn.ModuleList([Block(dims, params.variant == "xl", operator, each) for each in positions])
        self.norm = nn.LayerNorm(dims.d_model)

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        S, T = self.params.segment_len, x.shape[1]
        memory, caches, tokens = self.init_state(x.shape[0]) if state is None else state
        first = min(T, S - tokens % S)
        sizes = [first] + [S] * ((T - first) // S) + [(T - first) % S] * ((T - first) % S > 0)
        end, outputs = tokens + T, Joined(T)
        with buffers_kept():
            for part in x.split(sizes, dim=1):  # not slices: the gradient of each would be as long as the sequence
                fill = tokens % S
                if not fill:
                    memory = self.cut(memory, tokens // S)
                tokens += part.shape[1]
                # What a whole sequence writes after its last segment would be read by nobody.
                writes = tokens % S == 0 and (state is not None or tokens < end)
                known, keep = caches if fill else None, state is not None and not writes
                y, written, caches = self.piece(part, memory, known, writes, keep)
                outputs.add(y)
                del y  # else it would live through the next piece
                if writes:
                    memory, caches = written, self.no_rows(x.shape[0])
        if state is None:
            return Output(outputs.result())
        detached = tuple(Cache(cache.k.detach(), cache.v.detach()) for cache in caches)
        return Output(outputs.result(), State(memory.detach().clone(), detached, tokens))

    def piece(
        self, x: torch.Tensor, memory: torch.Tensor, caches: tuple[Cache, ...] | None, writes: bool, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Cache, ...]]:
        """Consecutive tokens of one segment through all layers: outputs, what the write tokens say, keys and values.

        ``caches`` is None for the first tokens of a segment, which come with the read tokens. Keys and values are
        empty unless ``keep``.
        """
        length, m = x.shape[1], memory.shape[1]
        rows = Rows(m if caches is None else 0, length, m if writes else 0)
        hidden = torch.cat([memory] * (caches is None) + [x] + [memory] * writes, dim=1)
        kept = []
        for index, layer in enumerate(self.layers):
            # Above the top layer nobody looks at the read tokens again.
            unread = rows.reads if index == len(self.layers) - 1 else 0
            hidden, cache = layer(hidden, None if caches is None else caches[index], rows, unread)
            if keep:
                kept.append(cache)
            del cache  # else it would live through the next layer
        hidden = self.norm(hidden)
        y, written = hidden.split((length, rows.writes), dim=1)
        return y, written, tuple(kept)

    def cut(self, memory: torch.Tensor, segment: int) -> torch.Tensor:
        """Stop the gradient before every ``bptt_depth + 1``-th segment: chains of that many, as the boundary rule."""
        depth = self.params.bptt_depth
        return memory.detach() if depth >= 0 and segment and segment % (depth + 1) == 0 else memory

    def no_rows(self, batch_size: int) -> tuple[Cache, ...]:
        """Caches where no segment is under way."""
        return self._caches(batch_size, 0)

    def init_state(self, batch_size: int) -> State:
        """The learned memory, one copy a batch row."""
        return State(self.memory.repeat(batch_size, 1, 1), self.no_rows(batch_size), 0)

    def state_at(self, batch_size: int, context: int) -> State:
        """Random contents in the shapes that follow ``context`` tokens."""
        fill = context % self.params.segment_len
        rows = self.params.num_memory + fill if fill else 0
        memory = torch.randn_like(self.memory.expand(batch_size, -1, -1))
        return State(memory, self._caches(batch_size, rows), context)

    def _caches(self, batch_size: int, rows: int) -> tuple[Cache, ...]:
        shape = (batch_size, self.num_heads, rows, self.head_dim)

        def draw() -> torch.Tensor:
            return torch.randn(shape, device=self.memory.device, dtype=self.memory.dtype)

        return tuple(Cache(draw(), draw()) for _ in self.layers)


def build(dims: Dims, params: RMTParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Equal weights in every impl; they differ in the operator, and ``graph`` in the loop over segments."""
    from ctxbench.implementations.rmt import METHOD

    stack = replaying(RMT, params.segment_len) if impl == "graph" else RMT
    return stack(dims, params, load(METHOD.impl(impl).run), impl).to(device, dtype)
