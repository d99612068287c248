"""Position encodings that methods share: rotations of queries and keys, and biases of scores by distance.

A layer holds one :class:`Position` and calls it in two places, whatever the encoding is::

    q, k = self.position.both(q, k, offset)                        # before any gather, shift or cache
    bias = self.position.bias(distance, q.dtype)                   # None, or [H, *distance.shape], distance = j - i
    scores = q @ k.mT * head_dim**-0.5 (+ bias)

The score keeps its factor ``1 / sqrt(head_dim)`` under every encoding. T5 has none: there it is folded into the
initial weights, and the two differ by a rescaling of the query projection.

Rotations by absolute positions depend on differences alone in the score, so a cache may hold rotated keys. Frequencies
are fixed when the layer is built: ``scale = max(1, seq_len / ORIGINAL_LENGTH)``, so that within the length a model is
taken to be trained on, the three extensions of RoPE are RoPE itself, and no call, however long the stream, changes what
a cached key was rotated by.

B batch, H heads, T tokens, D head width, n pairs of channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ctxbench.method import ROPE, Dims

BASE = 10_000.0  # of the frequencies, Su et al. 2021
ORIGINAL_LENGTH = 4096  # tokens a model is taken to be trained on: Llama 2, from which YaRN extends
YARN = ("rope_yarn", "rope_yarn_rotation")
FASTEST, SLOWEST = 32, 1  # YaRN: turns over the original length that mark the ends of its ramp
BUCKETS, FARTHEST = 32, 128  # T5: rows of its table, and the distance from which on all share one

Positions = torch.Tensor | Sequence[int] | int


class Position(nn.Module):
    """No encoding, and the interface of the others.

    Buffers are constants in float64: they follow the module to its device, never into the dtype of its weights.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Position:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, constant in exact.items():
            setattr(self, name, constant.to(getattr(self, name).device))
        return self

    def rotate(self, x: torch.Tensor, positions: Positions, step: int = 1) -> torch.Tensor:
        """Queries or keys ``[..., T, D]`` at T positions, or at those that begin with one integer, ``step`` apart."""
        return x

    def queries(self, q: torch.Tensor, positions: Positions, step: int = 1) -> Any:
        """Queries as the impl's attention takes them: rotated, unless it does that by itself, see ``turning``."""
        return self.rotate(q, positions, step)

    def both(self, q: torch.Tensor, k: torch.Tensor, positions: Positions, step: int = 1) -> tuple[Any, torch.Tensor]:
        """Queries, and rotated keys, ``[..., T, D]`` at the same positions."""
        return self.queries(q, positions, step), self.rotate(k, positions, step)

    def rotate_both(
        self, q: torch.Tensor, k: torch.Tensor, positions: Positions, step: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The same for attention that takes rotated queries alone."""
        return self.rotate(q, positions, step), self.rotate(k, positions, step)

    def bias(self, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of keys ``distance = j - i`` away: ``[H, *distance.shape]``, or None."""
        return None

    def compact(self) -> torch.Tensor | None:
        """The bias as kernels take it, at least in float32, see ``ranges.attend``: slopes ``[H]``, a table, or None."""
        return None

    def rectangle(self, queries: int, keys: int, offset: int, like: torch.Tensor, step: int = 1) -> torch.Tensor | None:
        """The bias of ``queries`` consecutive rows against ``keys`` consecutive columns: ``[H, queries, keys]``.

        ``offset`` is the position of the first query minus that of the first key, in steps of ``step`` tokens as all
        distances here are; dtype and device are those of ``like``.
        """
        return None


class Bias(Position, ABC):
    """A number for each head and distance, added to the scores."""

    @abstractmethod
    def bias(self, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What is added, never None here."""

    def rectangle(self, queries: int, keys: int, offset: int, like: torch.Tensor, step: int = 1) -> torch.Tensor:
        """Evaluated once a diagonal, not once a pair."""
        steps = torch.arange(1 - queries - offset, keys - offset, device=like.device)
        line = self.bias(steps * step, like.dtype)
        return from_diagonals(line, keys)


class _Diagonals(torch.autograd.Function):
    """See :func:`from_diagonals`; a head at a time, because what is turned round has no rows in one piece."""

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, keys: int) -> torch.Tensor:
        ctx.form = line.shape, keys
        out = line.new_empty(len(line), line.shape[1] - keys + 1, keys)
        for head, numbers in zip(out, line, strict=True):
            head.copy_(numbers.unfold(0, keys, 1).flip(0))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        shape, keys = ctx.form
        return torch.ops.aten.unfold_backward(grad.flip(1), shape, 1, keys, 1), None


def from_diagonals(line: torch.Tensor, keys: int) -> torch.Tensor:
    """``[H, queries + keys - 1]``, a number a diagonal, as ``[H, queries, keys]``: the last row begins the line.

    Contiguous: of any other bias, fused attention on the CPU makes a copy that is, at every call.
    """
    if line.shape[1] == keys:
        return line.unsqueeze(1).contiguous()
    out: torch.Tensor = _Diagonals.apply(line, keys)
    return out


class Tables(NamedTuple):
    """Cosines and sines of all angles, ``[T, D / 2]`` each, YaRN's temperature included."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rotary(Position):
    """RoPE (Su et al. 2021, arXiv:2104.09864) and its extensions: channel n turns with channel n + D/2.

    Args:
        head_dim: width of a head, even.
        kind: ``rope``, or by which rule its frequencies change: ``rope_linear``, ``rope_ntk``, ``rope_yarn``,
            ``rope_yarn_rotation``; see :func:`frequencies`.
        scale: target length over original length.

    Raises:
        ValueError: for an odd head width, an unknown kind, or a scale below 1.
    """

    frequencies: torch.Tensor

    def __init__(
        self, head_dim: int, kind: str = "rope", scale: float = 1.0, *, base: float = BASE,
        original_length: int = ORIGINAL_LENGTH,
    ):  # fmt: skip
        super().__init__()
        values = frequencies(head_dim, kind, scale, base=base, original_length=original_length)
        self.register_buffer("frequencies", values, persistent=False)
        self.temperature = 0.1 * math.log(scale) + 1 if kind in YARN else 1.0

    def tables(self, positions: Positions, length: int, dtype: torch.dtype, step: int = 1) -> Tables:
        """Of ``length`` tokens, in ``dtype`` or float32, whichever is finer: bfloat16 cannot tell 256 from 257."""
        exact, device = torch.promote_types(dtype, torch.float32), self.frequencies.device
        if isinstance(positions, int):
            positions = torch.arange(positions, positions + length * step, step, device=device)
        elif not isinstance(positions, torch.Tensor):
            positions = torch.tensor(positions, dtype=torch.int64, device=device)
        angles = positions.to(exact)[..., None] * self.frequencies.to(exact)
        return Tables(angles.cos() * self.temperature, angles.sin() * self.temperature)

    def rotate(self, x: torch.Tensor, positions: Positions, step: int = 1) -> torch.Tensor:
        return turn(x, self.tables(positions, x.shape[-2], x.dtype, step))


def turn(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate ``x: [..., T, D]``; the products are taken in the tables' dtype and rounded once."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = tables
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def frequencies(
    head_dim: int, kind: str = "rope", scale: float = 1.0, *, base: float = BASE,
    original_length: int = ORIGINAL_LENGTH,
) -> torch.Tensor:  # fmt: skip
    """Radians a token of each pair of channels, float64 ``[D / 2]``, falling.

    ``rope``: base^(-2 n / D). ``rope_linear`` divides all by the scale (Chen et al. 2023, arXiv:2306.15595).
    ``rope_ntk`` raises the base to ``base * scale^(D / (D - 2))``: the highest frequency stays and the lowest is
    divided by the scale. ``rope_yarn`` (Peng et al. 2023, arXiv:2309.00071) leaves what turns more than FASTEST times
    in the original length, divides what turns less than SLOWEST times, and mixes between: linearly in n, as the
    released code does. ``rope_yarn_rotation`` mixes linearly in the number of turns, as the paper's equation does.
    """
    if head_dim % 2:
        raise ValueError(f"a rotation turns pairs of channels: head_dim must be even, received {head_dim}")
    if not scale >= 1:
        raise ValueError(f"scale must be at least 1, received {scale}")
    n = torch.arange(head_dim // 2, dtype=torch.float64)
    plain = base ** (-2 * n / head_dim)
    if kind == "rope":
        return plain
    if kind == "rope_linear":
        return plain / scale
    if kind == "rope_ntk":
        return plain * scale ** (-n / max(head_dim // 2 - 1, 1))
    if kind in YARN:
        kept = _kept_by_yarn(n, plain, head_dim, base, original_length, kind)
        return kept * plain + (1 - kept) * plain / scale
    raise ValueError(f"kind must be one of {', '.join(ROPE)}, received {kind!r}")


def _kept_by_yarn(
    n: torch.Tensor, plain: torch.Tensor, head_dim: int, base: float, original_length: int, kind: str
) -> torch.Tensor:
    """The part of each frequency that is not divided: 1 for the fastest, 0 for the slowest."""
    if kind == "rope_yarn_rotation":
        turns = original_length * plain / (2 * math.pi)
        return ((turns - SLOWEST) / (FASTEST - SLOWEST)).clamp(0, 1)
    first, last = (
        head_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(base))
        for turns in (FASTEST, SLOWEST)
    )
    low, high = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    return 1 - ((n - low) / max(high - low, 1e-3)).clamp(0, 1)


class T5Bias(Bias):
    """A learned number a head and bucket of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Half of the buckets are single distances, the others grow until FARTHEST. One table serves all layers.
    """

    def __init__(self, dims: Dims):
        super().__init__()
        self.causal = dims.causal
        self.table = nn.Embedding(BUCKETS, dims.num_heads)
        nn.init.normal_(self.table.weight, std=dims.d_model**-0.5)

    def bias(self, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.table(bucket(distance, self.causal)).movedim(-1, 0).to(dtype)

    def compact(self) -> torch.Tensor:
        """``[H, 2 * FARTHEST + 1]``, by distance: beyond FARTHEST all are the same."""
        reach = torch.arange(-FARTHEST, FARTHEST + 1, device=self.table.weight.device)
        return self.bias(reach, torch.promote_types(self.table.weight.dtype, torch.float32))


def bucket(distance: torch.Tensor, causal: bool) -> torch.Tensor:
    """Row of T5's table for each ``j - i``; bidirectional, the upper half of the rows is for later keys."""
    side = BUCKETS if causal else BUCKETS // 2
    away = (-distance).clamp(min=0) if causal else distance.abs()
    single = side // 2
    growth = (away.clamp(min=1).float() / single).log() / math.log(FARTHEST / single)
    spread = (single + (growth * (side - single)).long()).clamp(max=side - 1)
    row = torch.where(away < single, away, spread)
    return row if causal else row + side * (distance > 0)


class AlibiBias(Bias):
    """``-m |j - i|`` with a fixed slope a head (Press et al. 2022, arXiv:2108.12409); symmetric where bidirectional."""

    slopes: torch.Tensor

    def __init__(self, dims: Dims):
        super().__init__()
        self.register_buffer("slopes", torch.tensor(slopes(dims.num_heads), dtype=torch.float64), persistent=False)

    def bias(self, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        slope = self.slopes.to(torch.promote_types(dtype, torch.float32)).view(-1, *[1] * distance.dim())
        return (-slope * distance.abs()).to(dtype)  # rounded once: bfloat16 has no distance of 257

    def compact(self) -> torch.Tensor:
        return self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))


class OfHeads(Bias):
    """The bias of some heads of a layer."""

    def __init__(self, whole: Bias, heads: slice):
        super().__init__()
        self.whole, self.heads = whole, heads

    def bias(self, distance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.whole.bias(distance, dtype)[self.heads]

    def compact(self) -> torch.Tensor:
        table = self.whole.compact()
        assert table is not None  # of a bias it never is
        return table[self.heads]


def of_heads(position: Position, heads: slice) -> Position:
    """What some heads of a layer are given: a rotation or nothing is the same for all of them."""
    return OfHeads(position, heads) if isinstance(position, Bias) else position


def slopes(num_heads: int) -> list[float]:
    """``2^(-8 i / n)`` for the first n heads, n the largest power of two; then every other slope of 2 n heads."""
    power = 1 << (num_heads.bit_length() - 1)
    first = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return first + [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (num_heads - power), 2)]


class RelativeTerm(Position):
    """Transformer-XL's weights of one layer: the score ``[(q + u) k + (q + v) W R_(i - j)] / sqrt(D)``.

    Neither a rotation nor a bias: it depends on the query's content, so only a layer that computes it by itself can
    take it (Dai et al. 2019, arXiv:1901.02860, section 3.3). ``content_bias`` is u, ``position_bias`` v, ``r`` W.
    """

    def __init__(self, dims: Dims):
        super().__init__()
        self.num_heads = dims.num_heads
        self.r = nn.Linear(dims.d_model, dims.d_model, bias=False)
        self.content_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim).normal_(std=0.02))
        self.position_bias = nn.Parameter(torch.empty(dims.num_heads, dims.head_dim).normal_(std=0.02))

    def keys(self, first: int, last: int) -> torch.Tensor:
        """``W R`` for the distances i - j from ``first`` to ``last``, falling or rising: ``[H, distances, D]``."""
        weight = self.r.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        step = -1 if last < first else 1
        distance = torch.arange(first, last + step, step, device=weight.device, dtype=exact)
        rows = sinusoids(distance, weight.shape[1]).to(weight.dtype)
        return self.r(rows).unflatten(1, (self.num_heads, -1)).transpose(0, 1)


def sinusoids(distance: torch.Tensor, width: int) -> torch.Tensor:
    """A row for each distance: all sines, then all cosines; ``[*distance.shape, width]`` in the distances' dtype."""
    n = torch.arange(0, width, 2, dtype=distance.dtype, device=distance.device)
    angle = distance[..., None] * BASE ** (-n / width)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[..., :width]


def positions_for(dims: Dims, layers: int | None = None, rotary: type[Rotary] = Rotary) -> list[Position]:
    """One :class:`Position` a layer; what has no weights of its own, and T5's table, is one object for all."""
    count = dims.num_layers if layers is None else layers
    if dims.position == "transformer_xl":
        return [RelativeTerm(dims) for _ in range(count)]
    return [_shared(dims, rotary)] * count


def _shared(dims: Dims, rotary: type[Rotary]) -> Position:
    if dims.position == "none":
        return Position()
    if dims.position == "t5":
        return T5Bias(dims)
    if dims.position == "alibi":
        return AlibiBias(dims)
    return rotary(dims.head_dim, dims.position, max(1.0, dims.seq_len / ORIGINAL_LENGTH))
