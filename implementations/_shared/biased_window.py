"""Causal sliding-window attention over unit queries and keys, with a bias by distance.

B batch, H heads, T queries, S keys (the last T of them are the queries' own tokens), D head width, W window: a query
sees the last W keys, its own included. Scores are ``scale_h cos(q, k) + bias_h(distance)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from ctxbench.implementations._shared.biased_window_forms import BLOCK
from ctxbench.implementations._shared.blocks import merge_heads, split_heads
from ctxbench.implementations._shared.positions import Position
from ctxbench.method import Dims, Output

Pieces = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of consecutive tokens, each [B, H, rows, D]


class Recent(NamedTuple):
    """Keys and values of the last ``min(t, W - 1)`` tokens, each ``[B, H, R, D]``, detached."""

    k: torch.Tensor
    v: torch.Tensor


class Compact(NamedTuple):
    """The window, and its bias as kernels take it, see ``ranges.attend``."""

    window: int
    bias: torch.Tensor | None


class WindowAttention(nn.Module):
    """Projections and state around ``operator(q, k, v, bias) -> [B, H, T, D]``; ``scale`` is where s_h begins."""

    def __init__(self, dims: Dims, window: int, position: Position, operator: Any, scale: float):
        super().__init__()
        self.num_heads, self.head_dim, self.window = dims.num_heads, dims.head_dim, window
        self.q, self.k, self.v, self.o = (nn.Linear(dims.d_model, dims.d_model, bias=False) for _ in range(4))
        self.scale = nn.Parameter(torch.full((dims.num_heads,), scale))
        self.position, self.operator = position, operator

    def forward(self, x: torch.Tensor, state: Recent | None = None) -> Output:
        q, *own = self.project(x)
        pieces = self.pieces(state, *own)
        del own  # else they would be there twice where they are joined
        mixed = self.mixed(q, pieces)
        if state is not None:
            state = Recent(*last(pieces, self.window - 1))
        del q, pieces  # else they would live through the output projection
        return Output(self.o(merge_heads(mixed)), state)

    def pieces(self, past: Any, k: torch.Tensor, v: torch.Tensor) -> Pieces:
        """Keys and values before a call and of it, joined unless the operator takes them ``apart``."""
        if past is None:
            return [(k, v)]
        if hasattr(self.operator, "apart") and past.k.shape[2] and k.shape[2] > 1:
            return [(past.k, past.v), (k, v)]
        return [(torch.cat((past.k, k), dim=2), torch.cat((past.v, v), dim=2))]

    def mixed(self, q: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        """What the window gives the queries, ``[B, H, T, D]``."""
        one, bias = len(pieces) == 1, self.bias()
        out: torch.Tensor = self.operator(q, *pieces[0], bias) if one else self.operator.apart(q, pieces, bias)
        return out

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scaled unit queries, unit keys, values: each ``[B, H, T, D]``."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.q, self.k, self.v))
        return normalize(q, dim=3) * self.scale[:, None, None], normalize(k, dim=3), v

    def bias(self) -> Any:
        """Bias of distances 0 to W - 1, ``[H, W]``; a :class:`Compact` for an operator that takes one."""
        weight = self.k.weight
        if getattr(self.operator, "compact", False):
            return Compact(self.window, self.position.compact())
        bias = self.position.bias(-torch.arange(self.window, device=weight.device), weight.dtype)
        return weight.new_zeros(self.num_heads, self.window) if bias is None else bias

    def init_state(self, batch_size: int) -> Any:
        """State before the first token."""
        return self.state_at(batch_size, 0)

    def state_at(self, batch_size: int, context: int) -> Any:
        """State shaped as after ``context`` tokens, contents random."""
        return Recent(*self.random_rows(batch_size, min(context, self.window - 1), 2))

    def random_rows(self, batch_size: int, rows: int, count: int) -> list[torch.Tensor]:
        """``count`` tensors ``[B, H, rows, D]``."""
        weight, shape = self.k.weight, (batch_size, self.num_heads, rows, self.head_dim)
        return [torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(count)]


def last(pieces: Pieces, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Detached copies of the last rows; of all, where there are fewer."""
    found = between(pieces, sum(k.shape[2] for k, _ in pieces) - rows)
    if len(found) == 1:
        return tuple(a.detach().clone(memory_format=torch.contiguous_format) for a in found[0])  # type: ignore[return-value]
    return tuple(torch.cat([a.detach() for a in parts], dim=2) for parts in zip(*found, strict=True))  # type: ignore[return-value]


def between(pieces: Pieces, first: int, stop: int | None = None) -> Pieces:
    """Rows ``first`` to ``stop`` of pieces that follow one another, without pieces that have none of them."""
    found: Pieces = []
    for k, v in pieces:
        rows = slice(max(first, 0), k.shape[2] if stop is None else min(stop, k.shape[2]))
        if rows.start < rows.stop:
            found.append((k[:, :, rows], v[:, :, rows]))
        first, stop = first - k.shape[2], None if stop is None else stop - k.shape[2]
    return found or [(k[:, :, :0], v[:, :, :0])]


def attend_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Pieces of W queries, each against the keys it may see, all scores kept; ``[B, H, T, D]``."""
    past, W = k.shape[2] - q.shape[2], bias.shape[1]
    outputs = []
    for first, piece in enumerate(q.split(W, dim=2)):
        oldest, end = max(past + first * W - W + 1, 0), past + first * W + piece.shape[2]
        outputs.append(_piece(piece, k[:, :, oldest:end], v[:, :, oldest:end], bias))
    return torch.cat(outputs, dim=2)


def _piece(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same for T <= W; a function, so that nothing of one piece lives through the next."""
    T, S, W = q.shape[2], k.shape[2], bias.shape[1]
    distance = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    scores = q @ k.transpose(2, 3) + bias[:, distance.clamp(0, W - 1)]
    scores = scores.masked_fill((distance < 0) | (distance >= W), float("-inf"))
    return scores.softmax(dim=3) @ v


def attend_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same in blocks of BLOCK queries; no scores are kept, the backward pass computes them again."""
    rows = min(BLOCK, q.shape[2])
    B, H = q.shape[:2]
    mixed = _Band.apply(*(a.flatten(0, 1) for a in (q, k, v)), diagonals(bias, rows))
    return mixed.unflatten(0, (B, H))


def diagonals(bias: torch.Tensor, rows: int) -> torch.Tensor:
    """``[H, W] -> [H, rows, W - 1 + rows]``: bias of row r and column c, distance W - 1 + r - c, else -inf.

    A row of all biases and ``rows`` times -inf, again and again, read with rows one shorter: each starts one later.
    """
    H, W = bias.shape
    hidden = bias.new_full((1, 1, 1), float("-inf")).expand(H, rows, rows)
    padded = torch.cat((bias.flip(1)[:, None].expand(H, rows, W), hidden), dim=2)
    return padded.flatten(1)[:, : rows * (W - 1 + rows)].view(H, rows, W - 1 + rows)


class _Band(torch.autograd.Function):
    """``q: [X, T, D]``, ``k, v: [X, S, D]``, X = B H; ``bias: [H, rows, W - 1 + rows]``; result ``[X, T, D]``."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v, bias)
        out = torch.empty_like(q)
        for rows, keys, own in _blocks(q, k, bias):
            out[:, rows] = _probabilities(q[:, rows], k[:, keys], bias[own]) @ v[:, keys]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, bias = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # every block adds to the bias, several to a key
        dq = torch.empty_like(q)
        dk, dv, dbias = (torch.zeros_like(a, dtype=wide) for a in (k, v, bias))
        for rows, keys, own in _blocks(q, k, bias):
            p, above = _probabilities(q[:, rows], k[:, keys], bias[own]), grad[:, rows]
            dv[:, keys] += p.transpose(1, 2) @ above
            ds = torch._softmax_backward_data(above @ v[:, keys].transpose(1, 2), p, 2, p.dtype)
            del p
            dk[:, keys] += ds.transpose(1, 2) @ q[:, rows]
            dq[:, rows] = ds @ k[:, keys]
            dbias[own] += ds.unflatten(0, (-1, len(bias))).sum(dim=0, dtype=wide)
            del ds
        return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype)


def _blocks(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> list[tuple[slice, slice, Any]]:
    """Rows of each block, the keys they see, and the part of the bias between them."""
    T, past, size = q.shape[1], k.shape[1] - q.shape[1], bias.shape[1]
    most, found = bias.shape[2] - size, []  # most: keys before a block that its first row sees
    for first in range(0, T, size):
        rows, before = min(size, T - first), min(past + first, most)
        keys = slice(past + first - before, past + first + rows)
        found.append((slice(first, first + rows), keys, (slice(None), slice(rows), slice(most - before, most + rows))))
    return found


def _probabilities(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(1, 2)
    scores.unflatten(0, (-1, len(bias))).add_(bias)
    return torch.softmax(scores, dim=2)
