"""Closed forms of the allocator peak: what is alive together at the worst moment of each mode.

A row is one ``[B, T, d]`` tensor, a slab one ``[B, R, d]`` tensor of the states.
"""

from __future__ import annotations

from sympy import Expr, Integer, Max, Min, floor, sympify

from ctxbench.cost.symbols import B, L, T, d, e, f, h, param
from ctxbench.cost.terms import largest, tensor, when_ffn
from ctxbench.implementations._shared.biased_window_forms import BLOCK, block_pairs
from ctxbench.implementations._shared.forms import stack_peak
from ctxbench.implementations.block_recurrent.params import FROM_TOP, BlockRecurrentParams

W, R = param("window"), param("num_states")
WHOLE = floor(T / W)
REST = T - WHOLE * W
SLAB = tensor(B, R, d)


def peak(impl: str, mode: str, params: BlockRecurrentParams) -> Expr | None:
    """Bytes above parameters, inputs and incoming state; None where no formula is known."""
    if params.gate == "lstm" and mode == "train":
        return None
    if impl in ("triton", "slabs"):
        return None
    if impl == "blocked":
        return _blocked_forward() if mode == "forward" else None
    return {"forward": _forward, "train": _train, "stream": _stream, "decode": _decode}[mode]()


def row(tokens: Expr | int) -> Expr:
    """Bytes of ``tokens`` tokens of every batch row."""
    return tensor(B, tokens, d)


def _window(n: Expr | int, keys: Expr | int) -> Expr:
    """Scores, their bias and the sum, beside the distances."""
    n = sympify(n)
    return 2 * tensor(B, h, n, keys) + tensor(h, n, keys) + 8 * n * keys


def _write(keys: Expr | int) -> Expr:
    """Scores of an update and their probabilities; states before and after, with what is made of them."""
    return 2 * tensor(B, h, R, keys) + 8 * SLAB


def _forward() -> Expr:
    """Norm, queries, keys, values and outputs so far, at a window; later the local part and what was read."""
    n = Min(W, T)
    local = 4 * row(T) + row(T - n) + 3 * SLAB + _window(n, Min(T, 2 * W - 1))
    update = Min(WHOLE, 1) * (6 * row(T) + _write(Min(2 * W, T)))
    return stack_peak(T, largest(local, update, 8 * row(T)))


def _blocked_forward() -> Expr:
    """Rows; the scores of a block of queries."""
    n = Min(BLOCK, T)
    return stack_peak(T, largest(5 * row(T) + 2 * tensor(B, h, n, W - 1 + n), 8 * row(T)))


def _stream() -> Expr:
    """A call with the state before it and the output of the call before, in the recurrent layer or in the last one."""

    def call(begin: Expr, n: Expr, kept: Expr, ends: int) -> Expr:
        known, near = Min(W, begin), Min(W - 1, begin)
        old = 3 * SLAB + 2 * row(known) + (L - 1) * 2 * row(near) + Min(begin, 1) * row(W)
        held = 2 * row(known + n) + 2 * row(n)
        after = held + 3 * row(n) + largest(_write(Min(2 * W, known + n)), 2 * row(kept))
        new = 3 * ends * SLAB + 2 * row(kept)
        above = new + Max(L - 2, 0) * 2 * row(Min(W - 1, begin + n)) + 3 * row(n) + 2 * row(near + n)
        feed = when_ffn(2 * row(n) + 2 * tensor(B, n, f) + new)
        window = _window(n, near + n)
        return old + largest(held + window, after, feed, Min(L - 1, 1) * (above + window))

    whole = Min(WHOLE, 1) * call(WHOLE * W - W, W, W, ends=1)
    return largest(whole, Min(REST, 1) * call(WHOLE * W, REST, Min(W, WHOLE * W) + REST, ends=0))


def _decode() -> Expr:
    """Joined keys and values and their copies; a token that completes a window pays for an update.

    In a stack of several layers the last one has no states: what those below it keep is then held beside its own.
    """
    ends = floor((T + 1) / W) - WHOLE
    joined = 2 * row(Min(T, W + REST) + 1)
    kept = 2 * row(Min(T + 1, W + (1 - ends) * (REST + 1))) + ends * 3 * SLAB
    local = 2 * row(Min(T + 1, W - 1))
    recurrent = Max(L - FROM_TOP, 0) * local + joined + largest(kept, ends * _write(Min(2 * W, T + 1)))
    above = Min(L - 1, 1) * (kept + (L - 1) * local + 2 * row(Min(T, W - 1) + 1))
    return largest(recurrent, above) + 3 * row(1)


def _train() -> Expr:
    """All that is saved, when the network's hidden rows get their gradient."""
    pieces, updates = block_pairs(T, W, W), floor((T - 1) / W)
    keys = W * (2 * updates - Min(updates, 1))
    local = (tensor(B, h) + 9) * pieces
    recurrent = tensor(B, h, T * R + updates * R * R + keys * R) + (15 * updates + 4) * SLAB
    rows = 15 * row(T) + 3 * tensor(B, T, f)
    below = (L - 1) * (local + 11 * row(T) + 2 * tensor(B, T, f))
    return below + local + recurrent + rows + Integer(16) * B * T + 3 * e * B * h * T
