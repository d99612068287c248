"""The stack: windows one after the other through layers that hand slots to the next window (Chen et al. 2025).

B batch, W tokens and U summary tokens of a window, n rows that ask (tokens, and summary tokens where the window ends),
F filled slots of the long-term memory, H heads, D head width; d_model = H * D. Equations in README.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import relu

from ctxbench.implementations._shared.blocks import FeedForward, merge_heads, split_heads
from ctxbench.implementations._shared.graph import replaying
from ctxbench.implementations._shared.joined import Joined
from ctxbench.implementations._shared.positions import from_diagonals
from ctxbench.implementations._shared.products import buffers_kept
from ctxbench.implementations._shared.turning import positions_of
from ctxbench.implementations.melodi.norm import Norm, scaled
from ctxbench.implementations.melodi.params import MelodiParams, long_layer
from ctxbench.implementations.melodi.slots import Queue
from ctxbench.method import Dims, Output, load


class Memory(NamedTuple):
    """What one layer carries.

    ``k, v: [B, H, short_slots + fill, D]``: the short-term memory, then the tokens of the window so far;
    ``out: [B, fill, d_model]``: this layer's outputs for these tokens;
    ``long_k, long_v: [B, H, F, D]``: filled slots of the long-term memory, oldest first. Empty slots are not stored.
    """

    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    long_k: torch.Tensor
    long_v: torch.Tensor

    def alone(self) -> Memory:
        """With slots that are no part of a :class:`Queue`."""
        return self._replace(long_k=self.long_k.contiguous(), long_v=self.long_v.contiguous())


class State(NamedTuple):
    """A memory for every layer, and the number of tokens so far."""

    layers: tuple[Memory, ...]
    tokens: int


class TokenMixing(nn.Linear):
    """A linear map along the sequence axis: ``[B, in_features, d_model] -> [B, out_features, d_model]``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[None, :, None], self.weight.expand(x.shape[0], -1, -1), x)


class MelodiLayer(nn.Module):
    """Weights, norms and memories around an impl's ``attend`` and ``recall``."""

    def __init__(self, dims: Dims, params: MelodiParams, index: int, operators: Any, impl: str = ""):
        super().__init__()
        d_model, U, slots = dims.d_model, params.summary_tokens, params.short_slots
        self.num_heads, self.head_dim, self.params, self.operators = dims.num_heads, dims.head_dim, params, operators
        (self.position,) = positions_of(dims, impl, layers=1)  # T5: a table of its own
        self.norm = Norm(d_model)
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.scale = nn.Parameter(torch.full((dims.num_heads,), dims.head_dim**0.5))
        self.norm_ffn = Norm(d_model) if dims.d_ff else None
        self.ffn = FeedForward(d_model, dims.d_ff, relu) if dims.d_ff else None
        rows = params.window + U
        last = index == dims.num_layers - 1  # nobody reads its summary tokens
        self.mix_summary = TokenMixing(rows, U) if U and not last else None
        self.mix_short = TokenMixing(rows, slots) if slots else None
        self.residual = slots == U  # the short-term memory is then a change of the summary tokens
        self.norm_mix = Norm(d_model) if U and (self.residual or not last) else None
        is_long = index == long_layer(dims, params)
        self.mix_long = TokenMixing(rows, params.long_per_window) if is_long else None
        self.gate = nn.Parameter(torch.zeros(dims.num_heads, 1, dims.head_dim)) if is_long else None

    def forward(
        self, rows: torch.Tensor, summary: int | None, memory: Memory, bias: torch.Tensor | None, queue: Queue | None
    ) -> tuple[torch.Tensor, Memory | None]:
        """``rows: [B, n, d_model]``, the last ``summary`` of them summary tokens, to the next layer's rows.

        ``summary`` is None where the window goes on. The memory after these rows is made where there is a ``queue``.
        """
        keep = queue is not None
        normed = self.norm(rows)
        first = self.params.short_slots + memory.out.shape[1]  # the short-term memory comes before the window
        q = self._unit(self.q(normed)) * self.scale.abs()[:, None, None]
        k, v = self._unit(self.k(normed)), split_heads(self.v(normed), self.num_heads)
        del normed
        turned, k = self.position.both(q, k, first)
        if self.operators.takes_bias or (keep and summary is None):
            k = torch.cat((memory.k, k), dim=2)
            v = torch.cat((memory.v, v), dim=2)
            keys = k.shape[2] - (not self.operators.takes_own)  # nobody sees the last row
            mixed = self.operators.attend(turned, k[:, :, :keys], v[:, :, :keys], bias)
        else:
            mixed = self.operators.attend_apart(turned, memory.k, memory.v, k, v, bias)
        del turned
        if self.gate is not None:
            empty = self.params.long_slots - memory.long_k.shape[2]
            recalled = self.operators.recall(q, memory.long_k, memory.long_v, empty)
            mixed = torch.lerp(recalled, mixed, torch.sigmoid(self.gate))
            del recalled
        del q
        if summary is not None or not keep:
            del k, v  # of the window alone; what outlives it comes from the mixing
        rows = rows + self.o(merge_heads(mixed))
        del mixed
        if self.ffn is not None and self.norm_ffn is not None:
            rows = rows + self.ffn(self.norm_ffn(rows))
        if queue is None:
            return rows, None
        window = torch.cat((memory.out, rows), dim=1) if memory.out.shape[1] else rows
        if summary is None:
            return rows, Memory(k, v, window, memory.long_k, memory.long_v)
        return self._close(window, rows, summary, memory, queue)

    def _close(
        self, window: torch.Tensor, rows: torch.Tensor, summary: int, memory: Memory, queue: Queue
    ) -> tuple[Any, Memory]:  # fmt: skip
        """Mix a complete window, ``[B, W + U, d_model]``, into what the next window and the next layer get."""
        tokens, u = rows[:, : rows.shape[1] - summary], rows[:, rows.shape[1] - summary :]
        normed = window if self.norm_mix is None else self.norm_mix(window)
        if self.mix_short is None:
            k, v = (part[:, :, :0].clone() for part in (memory.k, memory.v))
        else:
            z = u + self.mix_short(normed) if self.residual else self.mix_short(window)
            k, v = self._remembered(z)
            k = self.position.rotate(k, 0)
        long_k, long_v = memory.long_k, memory.long_v
        if self.mix_long is not None:
            long_k, long_v = queue.push((long_k, long_v), self._remembered(self.mix_long(window)))
        if self.mix_summary is not None:
            change = self.mix_summary(normed)
            if torch.is_grad_enabled():
                rows = torch.cat((tokens, u + change), dim=1)
            else:  # in place, now that all that mixes has read them
                u += change
        return rows, Memory(k, v, rows[:, :0].clone(), long_k, long_v)

    def _remembered(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of memory slots, ``[B, slots, d_model]``: the norm and weights of the tokens."""
        normed = self.norm(slots)
        return self._unit(self.k(normed)), split_heads(self.v(normed), self.num_heads)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """Heads of ``[B, n, d_model]``, each row of length 1; zeros stay zeros."""
        return scaled(split_heads(x, self.num_heads), length=self.head_dim**-0.5)

    def biases(self, rows: int, keys: int) -> torch.Tensor | None:
        """What is added to scores ``[H, rows, keys]``: the scaled bias of the distance, minus infinity from 0 down.

        With one key more for operators that take the rows' own. Kernels know which keys a row sees: for them a table by
        distance, or None. The last row asks one place after the last of ``keys``. Equal distances lie on diagonals, so
        the matrix is read from one vector of falling distances in overlapping windows.
        """
        if not self.operators.takes_bias:
            return self._table(keys)
        before = torch.arange(-keys, 0, device=self.scale.device)
        seen = self.position.bias(before, self.scale.dtype)
        if seen is None:
            seen = self.scale.new_zeros(self.num_heads, keys)
        seen = seen * self.scale.abs()[:, None]
        own = int(self.operators.takes_own)  # hidden, too
        hidden = seen.new_full((self.num_heads, rows - 1 + own), float("-inf"))
        return from_diagonals(torch.cat((seen, hidden), dim=1), keys + own)

    def _table(self, keys: int) -> torch.Tensor | None:
        """The scaled bias of distances -F .. F, ``[H, 2 F + 1]``; slopes times a scale that learns are a table too."""
        table = self.position.compact()
        if table is not None and table.dim() == 1:
            reach = torch.arange(-keys, keys + 1, device=self.scale.device)
            table = self.position.bias(reach, torch.float32)
        return None if table is None else table * self.scale.abs()[:, None]

    def empty(self, batch_size: int, fill: int, filled: int, make: Any) -> Memory:
        """A memory with ``fill`` tokens in the window and ``filled`` slots in the long-term memory."""

        def heads(rows: int) -> torch.Tensor:
            return make(batch_size, self.num_heads, rows, self.head_dim, device=at.device, dtype=at.dtype)

        at, keys = self.q.weight, self.params.short_slots + fill
        out = make(batch_size, fill, self.num_heads * self.head_dim, device=at.device, dtype=at.dtype)
        return Memory(heads(keys), heads(keys), out, heads(filled), heads(filled))


class MelodiStack(nn.Module):
    """Windows through all layers, one after the other; ``summary`` are the summary tokens at the bottom."""

    def __init__(self, dims: Dims, params: MelodiParams, operators: Any, impl: str = ""):
        super().__init__()
        self.params = params
        U = params.summary_tokens
        self.summary = nn.Parameter(0.25 * torch.randn(U, dims.d_model)) if U else None
        self.layers = nn.ModuleList(MelodiLayer(dims, params, i, operators, impl) for i in range(dims.num_layers))

    def forward(self, x: torch.Tensor, state: State | None = None) -> Output:
        carried, outputs = state is not None, Joined(x.shape[1])
        after = self.windows(x, self.init_state(x.shape[0]) if state is None else state, carried, outputs)
        if not carried:
            return Output(outputs.result())
        layers = tuple(Memory(*(part.detach() for part in each)).alone() for each in after.layers)
        return Output(outputs.result(), State(layers, after.tokens))

    def windows(self, x: torch.Tensor, state: State, follows: bool, outputs: Joined) -> State:
        """Add outputs of consecutive tokens; the state after them where anything ``follows`` that reads it."""
        B, W = x.shape[0], self.params.window
        memories, tokens = state
        queue = Queue(self.params.long_slots, (tokens % W + x.shape[1] - (not follows)) // W)
        del state  # else the memories it came with would live through all windows
        biases: list[torch.Tensor | None] = []
        biased: tuple[int, int] | None = None  # rows and keys that they are for
        with buffers_kept():
            while x.shape[1]:
                piece, x = x[:, : W - tokens % W], x[:, W - tokens % W :]
                tokens += piece.shape[1]
                goes_on = follows or x.shape[1] > 0  # else nobody reads what the window would hand on
                ends = tokens % W == 0 and goes_on
                rows = piece
                if ends and self.summary is not None:
                    rows = torch.cat((piece, self.summary.expand(B, -1, -1)), dim=1)
                shape = (rows.shape[1], memories[0].k.shape[2] + rows.shape[1] - 1)
                if biased != shape:
                    biased = shape
                    biases.clear()
                    biases += [layer.biases(*shape) for layer in self.layers]  # type: ignore[operator]
                after, keeper = [], queue if goes_on else None
                for layer, memory, bias in zip(self.layers, memories, biases, strict=True):
                    rows, memory = layer(rows, self.params.summary_tokens if ends else None, memory, bias, keeper)
                    after.append(memory)
                memories = tuple(after)
                outputs.add(rows[:, : piece.shape[1]])
                del rows, memory, after, bias  # else the last would live while the next are made
        biases.clear()
        return State(memories, tokens)

    def init_state(self, batch_size: int) -> State:
        """Empty memories: zero keys and values that everybody sees."""
        return self._state(batch_size, 0, torch.zeros)

    def state_at(self, batch_size: int, context: int) -> State:
        """Random contents in the shapes that follow ``context`` tokens."""
        return self._state(batch_size, context, torch.randn)

    def _state(self, batch_size: int, context: int, make: Any) -> State:
        windows, fill = divmod(context, self.params.window)
        filled = min(self.params.long_slots, windows * self.params.long_per_window)
        layers = (layer.empty(batch_size, fill, 0 if layer.gate is None else filled, make) for layer in self.layers)  # type: ignore[operator]
        return State(tuple(layers), context)


def build(dims: Dims, params: MelodiParams, impl: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Impls differ in two operators; ``graph`` and ``diagonal_triton`` also in the order of windows and layers."""
    from ctxbench.implementations.melodi import METHOD

    stack: Any = replaying(MelodiStack, params.window) if impl == "graph" else MelodiStack
    if impl == "diagonal_triton":
        stack = load(f"{__package__}.diagonal:DiagonalStack")
    return stack(dims, params, load(METHOD.impl(impl).run), impl).to(device, dtype)
