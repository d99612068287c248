"""PyTorch's FlexAttention over ranges of keys between two lines: block lists in closed form, compiled or refused.

Query i stands at position ``p = i + offset`` and sees the keys of any range from ``low`` to before ``high``, lines over
p (see ``lines``), all under one softmax. Which tiles of keys a tile of queries meets, and which of them need no mask,
is arithmetic on the lines (``tiles``); no mask of tokens is ever made. FlexAttention wants its lists as tables of tiles
by tiles, so that at a million tokens they take a quarter of a gigabyte each.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import _disable_current_modes

from ctxbench.implementations._shared.flex_table import NARROWEST, TILE
from ctxbench.implementations._shared.lines import LEVEL, OPEN, SLOPE, Line, Placed, place
from ctxbench.implementations._shared.positions import FARTHEST, AlibiBias, Bias, Position
from ctxbench.implementations._shared.tiles import Keys, seen_by_rows

Score = Callable[..., torch.Tensor]

BACKEND = "inductor"  # of torch.compile: the one that makes kernels
BACKWARD_TILES = ("block_m1", "block_n1", "block_m2", "block_n2")  # sides, as inductor names them


class Between(NamedTuple):
    """Keys that a query at position p sees: from ``low`` at p to before ``high``; None is no bound.

    Lines count the ``keys`` keys from ``begin`` on, a multiple of TILE; None: all that come after it.
    """

    low: Line | None = None
    high: Line | None = None
    begin: int = 0
    keys: int | None = None


class Seen(NamedTuple):
    """The same for the rows of a query tensor."""

    low: Placed
    high: Placed
    begin: int
    keys: int


CAUSAL = (Between(high=Line(base=1)),)
ALL = (Between(),)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Sequence[Between], *, offset: int = 0,
    score: Score | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention over the keys that any of ``seen`` shows; every query must see one.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, H, S, D]``, as ``v``.
        v: values.
        seen: who sees whom.
        offset: position of the first query among the keys.
        score: changes the scaled score, as FlexAttention's ``score_mod``.
        scale: of the scores; None for ``D ** -0.5``.

    Returns:
        ``[B, H, T, D]``.
    """
    T, S = q.shape[2], k.shape[2]
    if not T:
        return q @ k.mT @ v  # no product at all, but what it is made of still has gradients, all zero
    ranges = tuple(_placed(one, offset, T, S) for one in seen)
    mask = None
    if not any(one.low.kind == one.high.kind == OPEN and one.keys == S for one in ranges):
        mask = block_mask(T, S, ranges, q.device)
    return run(q, k, v, mask, score, scale)


def _placed(one: Between, offset: int, T: int, S: int) -> Seen:
    keys = S - one.begin if one.keys is None else one.keys
    return Seen(place(one.low, offset, T, keys), place(one.high, offset, T, keys), one.begin, keys)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | None, score: Score | None = None,
    scale: float | None = None, block: int = TILE,
) -> torch.Tensor:  # fmt: skip
    """FlexAttention, compiled for this mask of blocks of ``block`` tokens, a multiple of NARROWEST.

    Raises:
        RuntimeError: where torch.compile is switched off, since FlexAttention would then keep all scores.
    """
    if isinstance(q, FakeTensor) or flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG:  # counted, or compared, not measured
        return _uncompiled(q, k, v, mask, score, scale)
    if torch._dynamo.config.disable:
        raise RuntimeError(
            "FlexAttention without its compiler keeps all scores, and torch.compile is switched off here; unset "
            "TORCH_COMPILE_DISABLE and torch._dynamo.config.disable, or choose another impl"
        )
    compiled = _compiled(block, id(mask), q.shape, k.shape, None if score is None else score.__code__)
    options = None if block == TILE else dict.fromkeys(("BLOCK_M", "BLOCK_N"), _side(block))
    return compiled(q, k, v, score, mask, scale, options)  # type: ignore[no-any-return]


def _side(block: int) -> int:
    """Tokens a side of the kernels' own tiles, which divide a block."""
    return next(side for side in (64, 32, NARROWEST) if block % side == 0)


@functools.cache
def _compiled(block: int, *_key: Any) -> Any:
    """A compiled call of its own: all shapes together would exceed what one function may be compiled for."""
    code = _call.__code__.replace()
    backend = BACKEND if block == TILE or BACKEND != "inductor" else _inductor_for(block)
    return torch.compile(types.FunctionType(code, globals()), fullgraph=True, dynamic=False, backend=backend)


def _inductor_for(block: int) -> Callable[..., Any]:
    """Inductor with backward kernels whose tiles divide ``block``, which its options cannot ask for.

    What it chooses from belongs to a thread, and the backward pass is compiled in another one.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.virtualized import V

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        with V.set_choices_handler(choices_for(block)):
            return compile_fx_inner(*args, **kwargs)

    def compile_all(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=compile_inner)

    return compile_all


def choices_for(block: int) -> Any:
    """Inductor's choices, but for the tiles of FlexAttention's backward pass where none of them divides ``block``."""
    from torch._inductor.choices import InductorChoices

    class Narrow(InductorChoices):
        def get_flex_attention_bwd_configs(self, *args: Any, **kwargs: Any) -> list[Any]:
            usual = super().get_flex_attention_bwd_configs(*args, **kwargs)
            fitting = [one for one in usual if not any(block % getattr(one, name) for name in BACKWARD_TILES)]
            return fitting or [dataclasses.replace(usual[-1], **dict.fromkeys(BACKWARD_TILES, _side(block)))]

    return Narrow()


def _call(q: Any, k: Any, v: Any, score: Any, mask: Any, scale: Any, options: Any) -> Any:
    return flex.flex_attention(q, k, v, score, mask, scale, kernel_options=options)


def _uncompiled(q: Any, k: Any, v: Any, mask: BlockMask | None, score: Score | None, scale: float | None) -> Any:
    """One operator; what a score reads is handed over as its compiler does, since it has no gradient otherwise."""
    mask = flex._create_empty_block_mask(q, k) if mask is None else mask
    score, read = (flex._identity, ()) if score is None else _lifted(score)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return flex.flex_attention_hop(q, k, v, score, mask.as_tuple(), scale, {}, read)[0]


def _lifted(score: Any) -> tuple[Score, tuple[torch.Tensor, ...]]:
    """``score`` with the trained tensors of its closure as further arguments, and those tensors."""
    cells = score.__closure__ or ()
    trained = [isinstance(x := cell.cell_contents, torch.Tensor) and x.requires_grad for cell in cells]

    def lifted(value: Any, b: Any, h: Any, row: Any, key: Any, *read: Any) -> Any:
        rest = iter(read)
        filled = tuple(types.CellType(next(rest)) if own else cell for cell, own in zip(cells, trained, strict=True))
        return types.FunctionType(score.__code__, score.__globals__, closure=filled)(value, b, h, row, key)

    return lifted, tuple(cell.cell_contents for cell, own in zip(cells, trained, strict=True) if own)


@functools.lru_cache(maxsize=64)
def block_mask(T: int, S: int, ranges: tuple[Seen, ...], device: torch.device) -> BlockMask:
    """Which tiles of S keys each tile of T queries meets, and which of those no query needs a mask for."""
    rows, columns = -(-T // TILE), -(-S // TILE)
    with _disable_current_modes():  # tables of the call, not tensors of the method
        tile = torch.arange(columns)
        kept, full = (torch.zeros(rows, columns, dtype=torch.bool) for _ in range(2))
        for one in ranges:
            keys = Keys(one.keys, one.low, one.high)
            met = torch.tensor([seen_by_rows(row * TILE, TILE, T, keys) for row in range(rows)])
            begin, inner, outer, end = met.T[:, :, None] + one.begin // TILE
            kept |= (begin <= tile) & (tile < end)
            full |= (inner <= tile) & (tile < outer)
        masked, unmasked = _lists(kept & ~full, device), _lists(full, device)
        return BlockMask.from_kv_blocks(
            masked[0], masked[1], unmasked[0], unmasked[1], BLOCK_SIZE=TILE, mask_mod=_visible(ranges),
            seq_lengths=(T, S),
        )  # fmt: skip


def _lists(kept: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many columns each row keeps, and which: the kept ones first, ascending; ``[1, 1, rows (, columns)]``."""
    counts = kept.sum(1, dtype=torch.int32)
    listed = (~kept).to(torch.uint8).argsort(dim=1, stable=True).int()
    return counts.to(device)[None, None], listed.to(device)[None, None]


def _visible(ranges: tuple[Seen, ...]) -> Score:
    """FlexAttention's ``mask_mod``: within the bounds of any range."""

    def within(b: Any, h: Any, row: Any, key: Any) -> Any:
        shown = None
        for low, high, begin, keys in ranges:
            own = key - begin if begin else key
            one = own < (keys if high.kind == OPEN else _at(high, row))
            if low.kind != OPEN:
                one = one & (own >= _at(low, row))
            if begin:
                one = one & (own >= 0)
            shown = one if shown is None else shown | one
        return shown

    return within


def _at(line: Placed, row: Any) -> Any:
    """A line at rows that are a tensor, without divisions where there is nothing to divide."""
    if line.kind == LEVEL:
        return line.base
    return row + line.base if line.kind == SLOPE else line.at(row)


def sloped(slopes: torch.Tensor, offset: int) -> Score:
    """``-slopes[h]`` for each token between query and key."""

    def score(value: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        return value - slopes[h] * (key - row - offset).abs()

    return score


def tabled(table: torch.Tensor, offset: int) -> Score:
    """``table: [H, 2 F + 1]``, a number by distance j - i from -F to F, and beyond them that of the end."""
    farthest = table.shape[1] // 2
    table = table.contiguous()  # of a transposed tensor that a score reads PyTorch 2.13 drops the gradient, silently

    def score(value: Any, b: Any, h: Any, row: Any, key: Any) -> Any:
        return value + table[h, (key - row - offset).clamp(-farthest, farthest) + farthest]

    return score


def biased(position: Position, offset: int, like: torch.Tensor, heads: slice = slice(None)) -> Score | None:
    """What a position encoding adds to scores of those ``heads``; constants and tables in at least float32."""
    if not isinstance(position, Bias):
        return None
    exact = torch.promote_types(like.dtype, torch.float32)
    if isinstance(position, AlibiBias):
        return sloped(position.slopes[heads].to(exact), offset)
    table = position.bias(torch.arange(-FARTHEST, FARTHEST + 1, device=like.device), exact)
    return tabled(table[heads], offset)
