"""Self-attention over a memory of the layer's own outputs and the segment, then a second look at the memory alone.

B batch, T tokens, S tokens a segment, M memory_len, m items remembered so far, H heads, D head width; equations in
README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ctxbench.implementations._shared.blocks import FeedForward, Stack, merge_heads, split_heads
from ctxbench.implementations._shared.graph import replaying
from ctxbench.implementations._shared.positions import Position
from ctxbench.implementations._shared.products import buffers_kept
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.segment_recurrent.params import SegmentRecurrentParams
from ctxbench.method import Dims, Output, load


class Keys(NamedTuple):
    """What the queries of a segment see, ``[B, H, *, D]``.

    ``k, v``: items of the memory, then tokens of the segment so far; ``read_k, read_v``: items alone, projected for
    the second look. Keys are rotated where the position encoding rotates: items at -m, ..., -1, tokens from 0 on.
    """

    k: torch.Tensor
    v: torch.Tensor
    read_k: torch.Tensor
    read_v: torch.Tensor


class State(NamedTuple):
    """What the next token needs; between calls detached.

    ``memory: [B, m, d_model]``; ``keys`` without rows where no segment is under way; ``tail``, those outputs of the
    segment so far that will enter the memory; ``tokens`` counts all tokens so far.
    """

    memory: torch.Tensor
    keys: Keys
    tail: torch.Tensor
    tokens: int

    def detached(self) -> State:
        """Without a graph; all tensors are copies already."""
        keys = Keys(*(part.detach() for part in self.keys))
        return State(self.memory.detach(), keys, self.tail.detach(), self.tokens)


class Look(NamedTuple):
    """How the queries of a piece stand to the keys of one of its looks.

    ``position`` adds a bias to the scores where it is one, by the distance between places: items have -m, ..., -1 by
    their order in the memory, whatever time they came from, and tokens 0, 1, ... from the beginning of their segment.
    So token i is i + 1 from the newest item and i + m from the oldest, in the first look as in the second, and both
    have one table or set of slopes. ``first``: places from the first key, an item if there are any, to the first query,
    in both looks. ``causal``: the last n keys are the queries' own tokens, else all keys are seen. ``begins``: the
    keys before those are a memory no longer than a segment.
    """

    position: Position
    first: int
    causal: bool
    begins: bool

    def second(self) -> Look:
        """The look at the memory alone, from the same places."""
        return self._replace(causal=False, begins=False)


Operator = Callable[..., torch.Tensor]  # of q, k, v and a look; one that is ``apart`` also takes the memory's k, v


class SegmentRecurrentLayer(nn.Module):
    """Post-norm layer around ``operator(q, k, v, look)``; segments of one layer follow one another."""

    def __init__(self, dims: Dims, params: SegmentRecurrentParams, operator: Operator, position: Position):
        super().__init__()
        d_model = dims.d_model
        self.num_heads, self.head_dim = dims.num_heads, dims.head_dim
        self.params, self.operator, self.position = params, operator, position
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.norm_self = nn.LayerNorm(d_model)
        self.read_q, self.read_k, self.read_v, self.read_o = (nn.Linear(d_model, d_model) for _ in range(4))
        self.norm_read = nn.LayerNorm(d_model)
        self.ffn = FeedForward(d_model, dims.d_ff) if dims.d_ff else None
        self.norm_ffn = nn.LayerNorm(d_model) if dims.d_ff else None
        self.gate = nn.Linear(d_model, d_model)

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        carried = self.init_state(x.shape[0]) if state is None else state
        end, outputs = carried.tokens + x.shape[1], []
        with buffers_kept():
            for part in x.split(self.pieces(carried.tokens, x.shape[1]), dim=1):
                # What a whole sequence remembers of its last segment would be read by nobody.
                y, carried = self.step(part, carried, state is not None or carried.tokens + part.shape[1] < end)
                outputs.append(y)
        after = None if state is None else carried.detached()
        del carried  # else its keys would live while the outputs are joined
        return Output(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), after)

    def step(self, x: torch.Tensor, state: State, remembers: bool) -> tuple[torch.Tensor, State]:
        """Consecutive tokens of one segment; a complete one enters the memory if ``remembers``. Graphs are kept."""
        S = self.params.segment_len
        memory, keys, tail, tokens = state
        begins = tokens % S == 0
        if begins:
            memory = self.cut(memory, tokens // S)
            keys = self.look_at(memory)
        ends = (tokens + x.shape[1]) % S == 0
        y, keys = self.piece(x.contiguous(), keys, begins, ends)  # of several rows, else each map would copy it
        tail = self.extended(tail, y, tokens % S)
        tokens += x.shape[1]
        if tokens % S:
            return y, State(memory, keys, tail, tokens)
        if remembers:
            memory = self.remember(memory, tail)
        return y, State(memory, *self.no_segment(x.shape[0]), tokens)

    def pieces(self, tokens: int, length: int) -> list[int]:
        """Cut ``length`` tokens where their segments end; ``tokens`` came before."""
        S = self.params.segment_len
        first = min(length, S - tokens % S)
        whole, rest = divmod(length - first, S)
        return [first] + [S] * whole + [rest] * (rest > 0)

    def look_at(self, memory: torch.Tensor) -> Keys:
        """Projections of a segment's memory, whose items have the places they have for this segment."""
        projected = (project(memory) for project in (self.k, self.v, self.read_k, self.read_v))
        k, v, read_k, read_v = (split_heads(part, self.num_heads) for part in projected)
        oldest = -memory.shape[1]
        return Keys(self.position.rotate(k, oldest), v, self.position.rotate(read_k, oldest), read_v)

    def piece(self, x: torch.Tensor, keys: Keys, begins: bool, ends: bool) -> tuple[torch.Tensor, Keys]:
        """Consecutive tokens of one segment, ``[B, n, d_model]``: outputs, and the keys of all its tokens so far.

        These may be without the piece's own where it ``ends`` the segment: nobody will ask.
        """
        fill = keys.k.shape[2] - keys.read_k.shape[2]
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        q, k = self.position.both(q, k, fill)
        short = begins and self.params.memory_len <= self.params.segment_len
        look = Look(self.position, keys.k.shape[2], causal=True, begins=short)
        if ends and getattr(self.operator, "apart", False):
            mixed = self.operator(q, k, v, look, (keys.k, keys.v))
        else:
            k, v = torch.cat((keys.k, k), dim=2), torch.cat((keys.v, v), dim=2)
            mixed = self.operator(q, k, v, look)
        del q
        x = self.norm_self(x + self.o(merge_heads(mixed)))
        del mixed
        if keys.read_k.shape[2]:
            q = self.position.queries(split_heads(self.read_q(x), self.num_heads), fill)
            mixed = self.operator(q, keys.read_k, keys.read_v, look.second())
            x = x + self.read_o(merge_heads(mixed))
            del q, mixed
        x = self.norm_read(x)
        if self.ffn is not None and self.norm_ffn is not None:
            x = self.norm_ffn(x + self.ffn(x))
        return x, Keys(k, v, keys.read_k, keys.read_v)

    def extended(self, tail: torch.Tensor, y: torch.Tensor, fill: int) -> torch.Tensor:
        """The tail after outputs ``y`` that begin ``fill`` tokens into their segment."""
        skipped = max(0, self.params.segment_len - self.params.added - fill)
        return torch.cat((tail, y[:, skipped:]), dim=1)

    def remember(self, memory: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        """The memory after a segment that ended with the outputs ``tail``."""
        return self.mixed(memory, tail, torch.sigmoid(self.gate(tail)))

    def mixed(self, memory: torch.Tensor, tail: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Items between the mean of what was known and the segment's last outputs; the oldest go."""
        known = memory.sum(dim=1, keepdim=True) / max(memory.shape[1], 1)  # zero where nothing was
        items = torch.lerp(known.expand_as(tail), tail, gate)
        dropped = max(0, memory.shape[1] + items.shape[1] - self.params.memory_len)
        return torch.cat((memory[:, dropped:], items), dim=1)

    def cut(self, memory: torch.Tensor, segment: int) -> torch.Tensor:
        """Stop the gradient before every ``bptt_depth + 1``-th segment."""
        depth = self.params.bptt_depth
        return memory.detach() if depth >= 0 and segment and segment % (depth + 1) == 0 else memory

    def no_segment(self, batch_size: int) -> tuple[Keys, torch.Tensor]:
        """Keys and tail where no segment is under way."""
        return self._segment(batch_size, 0, 0, 0)

    def init_state(self, batch_size: int) -> State:
        """Nothing remembered."""
        return State(self._draw(batch_size, 0), *self.no_segment(batch_size), 0)

    def state_at(self, batch_size: int, context: int) -> State:
        """Random contents in the shapes that follow ``context`` tokens."""
        S, added = self.params.segment_len, self.params.added
        items, fill = min(self.params.memory_len, context // S * added), context % S
        rows = (items + fill, items) if fill else (0, 0)
        segment = self._segment(batch_size, *rows, max(0, fill - (S - added)))
        return State(self._draw(batch_size, items), *segment, context)

    def _segment(self, batch_size: int, rows: int, items: int, tail: int) -> tuple[Keys, torch.Tensor]:
        drawn = (self._draw(batch_size, count) for count in (rows, rows, items, items))
        return Keys(*(split_heads(part, self.num_heads) for part in drawn)), self._draw(batch_size, tail)

    def _draw(self, batch_size: int, rows: int) -> torch.Tensor:
        weight = self.q.weight
        return torch.randn(batch_size, rows, weight.shape[0], device=weight.device, dtype=weight.dtype)


class SegmentRecurrentStack(Stack):
    """The layers one after the other, each with a memory of its own outputs."""

    layers: Any

    def init_state(self, batch_size: int) -> tuple[Any, ...]:
        """State before the first token."""
        return tuple(layer.init_state(batch_size) for layer in self.layers)

    def state_at(self, batch_size: int, context: int) -> tuple[Any, ...]:
        """State shaped as after ``context`` tokens, contents random."""
        return tuple(layer.state_at(batch_size, context) for layer in self.layers)


def layers_of(dims: Dims, params: SegmentRecurrentParams, operator: Operator, impl: str) -> list[nn.Module]:
    """One layer for each position encoding, none of which meets a distance beyond memory and segment."""
    positions = positions_of(dims.replace(seq_len=min(dims.seq_len, params.memory_len + params.segment_len)), impl)
    return [SegmentRecurrentLayer(dims, params, operator, position) for position in positions]


def build(dims: Dims, params: SegmentRecurrentParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Equal weights in every impl but ``as_written``, which brings a stack of its own, as diagonal schedules do."""
    from ctxbench.implementations.segment_recurrent import METHOD

    run = load(METHOD.impl(impl).run)
    if isinstance(run, type):
        return run(dims, params).to(device, dtype)
    stack = replaying(SegmentRecurrentStack, params.segment_len) if impl == "graph" else SegmentRecurrentStack
    return stack(layers_of(dims, params, run, impl)).to(device, dtype)
