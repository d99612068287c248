"""What formulas of the allocator peak share: rows, segments, the band of blocks of queries, slabs of scores.

A row is one ``[B, T, d]`` tensor. X = B h heads, n queries, m pairs in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from sympy import Expr, Integer, Max, Min, floor, sympify

from ctxbench.cost.symbols import B, T, d, e, h, param
from ctxbench.cost.terms import largest, tensor
from ctxbench.implementations._shared.biased_window_forms import BLOCK
from ctxbench.implementations._shared.tournament import GROUP, padded
from ctxbench.implementations.memorizing.params import MemorizingParams
from ctxbench.implementations.memorizing.sizes import ROWS, SLAB

M, S, W, K = (param(name) for name in ("memory_len", "segment_len", "window", "top_k"))
WHOLE = floor(T / S)
REST = T - WHOLE * S
BATCHED = Min(B - 1, 1) * Min(h - 1, 1)  # heads of several batch rows are copied to stand in one line, others are not


def row(tokens: Expr | int) -> Expr:
    """Bytes of ``tokens`` tokens of every batch row."""
    return tensor(B, tokens, d)


def some(count: Expr | int) -> Expr:
    """1 where there are any, else 0."""
    return Max(Min(sympify(count), 1), 0)


def fills(params: MemorizingParams) -> Iterator[tuple[int, int, bool]]:
    """After how many whole segments the memory has how many pairs, where ``topk`` selects; last, where it is full."""
    full = -(-params.memory_len // params.segment_len)
    for filled in range(1, full + 1):
        pairs = min(params.memory_len, filled * params.segment_len)
        if pairs > params.top_k:
            yield filled, pairs, filled == full


def there(filled: int, full: bool) -> Expr:
    """1 where so many whole segments were filled before the last, unfinished one, or at least so many; else 0."""
    return some(WHOLE - filled + 1) * (Integer(1) if full else some(filled + 1 - WHOLE))


def scores_of_band(n: Expr, keys: Expr) -> Expr:
    """One tensor of scores of the worst block of ``n`` queries, the last of ``keys``: a whole one or what follows."""
    block = largest(1, Min(BLOCK, n))  # no queries make no scores either
    whole = floor(n / block)
    rest, before = n - whole * block, keys - n
    last = block * (Min(before + whole * block - block, W - 1) + block)
    return tensor(B, h) * largest(last, rest * (Min(before + whole * block, W - 1) + rest))


def bias_of_band(n: Expr) -> Expr:
    """Bias of a block by row and column."""
    block = Min(BLOCK, n)
    return tensor(h, block, W + block)


def slabs(n: Expr | int, m: int, top_k: int, copied: bool = True) -> Expr:
    """A lookup of n queries among m pairs: what is found, a slab of scores, its keys, and the tournament over it.

    Each round but the innermost holds a maximum a group; the innermost, what it chose from. From the second slab on,
    what was found in the one before is still there. ``copied``: keys are strided, as those of the call itself.
    """
    width, rounds = padded(m, top_k), 0
    while m > GROUP ** (rounds + 1) * top_k:
        rounds += 1
    n = sympify(n)
    rows = Min(n, max(ROWS, SLAB // width))
    heads = Min(B * h, largest(1, floor(SLAB / (rows * width))))
    found = row(n) + (4 + e) * B * h * n * K
    if rounds:
        inside = (48 + 6 * e) * K + e * sum(width // GROUP**turn for turn in range(1, rounds))
    else:
        inside = (8 + 2 * e) * K
    several = Min(1, largest(floor(B * h / heads), floor(n / rows)) - 1)
    batched = Min(B - 1, 1)
    copies = batched * row(n)
    if copied:
        copies += batched * 2 * row(m) + (1 - batched) * heads * m * d / h * e
    slab = tensor(heads, rows, width) + copies
    return found + slab + heads * rows * (inside + several * (8 + e) * K) + (8 * GROUP if rounds else 0)
